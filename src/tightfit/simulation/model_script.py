"""A training step of a causal language model of Transformers, for the virtual GPU.

`tightfit explain` runs a copy of this file under a dry run, with the sizes of somebody's model and the values of their
configuration as arguments; the program that failed is not run. Two steps are taken: the second is the first that has
the optimizer's state from its beginning.
"""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 2
_OUTPUT = ("lm_head", "embed_out", "output")
"""Names of the output layer, which no adapter is put on."""


class Adapter(nn.Module):
    """LoRA: a frozen linear layer plus a trained product of two narrow ones."""

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.up(self.down(x.to(self.down.weight.dtype))) * 2.0
        found: Tensor = self.base(x) + adapted
        return found


def with_adapters(model: nn.Module, rank: int, dtype: torch.dtype, targets: Sequence[str] = ()) -> None:
    """Freeze a model, and put an adapter on each linear layer of these names, or on each but the output's."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and (name in targets if targets else name not in _OUTPUT):
                setattr(parent, name, Adapter(child, rank, dtype))


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of one of the names that `tightfit explain` plays."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=1e-4)
    return torch.optim.AdamW(parameters, lr=1e-4)


def main(options: Mapping[str, Any], batch: int, passes: int) -> None:
    """Build the model on the card and take the steps."""
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(**options["config"])
    dtype, cast = getattr(torch, options["weights"]), options["cast"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(default)
    if options["rank"]:
        with_adapters(model, options["rank"], torch.float32 if cast else dtype, options["targets"])
        model.enable_input_require_grads()
    if options["checkpointing"]:
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = optimizer_of(options["optimizer"], [each for each in model.parameters() if each.requires_grad])
    ids = torch.zeros((batch, options["length"]), dtype=torch.long, device="cuda")
    for _ in range(STEPS):
        for _ in range(min(passes, 2)):
            with torch.autocast("cuda", dtype=getattr(torch, cast or "bfloat16"), enabled=bool(cast)):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / passes).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *(int(word.rpartition("=")[2]) for word in sys.argv[2:4]))
