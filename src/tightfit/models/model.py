"""GPT-2, with nanoGPT's parameter names, so that its checkpoints load and save both ways.

Shapes: b sequences, t tokens, c channels (n_embd), v vocabulary.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tightfit.config import CUDA_GRAPH_MODES
from tightfit.errors import CheckpointError, ConfigError
from tightfit.models.attention import KeyValueCache, cached_attention, causal_attention
from tightfit.models.linear import LayerNorm, gelu_linear, norm_linear, plain_linear, tied_embedding
from tightfit.models.loss import LossKind, token_loss
from tightfit.models.shape import PADDED_VOCAB, flops_per_token
from tightfit.wording import say

GPT2_VOCAB = 50_257
Activation = Literal["gelu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    block_size: int = 1024
    """Longest sequence, in tokens."""
    vocab_size: int = PADDED_VOCAB
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    """True if linear layers and layer norms have a bias, as GPT-2's do."""
    activation: Activation = "gelu"
    """nanoGPT's exact GELU, or the tanh approximation that OpenAI trained GPT-2 with."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ConfigError(say("models.model.size", name=name, value=getattr(self, name)))
        if self.n_embd % self.n_head:
            raise ConfigError(say("models.model.width", width=self.n_embd, heads=self.n_head))
        if not 0 <= self.dropout < 1:
            raise ConfigError(say("models.model.dropout", value=self.dropout))
        if self.activation not in ("gelu", "gelu_tanh"):
            raise ConfigError(say("models.model.activation", value=repr(self.activation)))

    def as_nanogpt(self) -> dict[str, int | float | str]:
        """The `model_args` of a nanoGPT checkpoint; an activation other than nanoGPT's is one entry more."""
        args = asdict(self)
        if self.activation == "gelu":
            del args["activation"]
        return args

    @classmethod
    def from_nanogpt(cls, model_args: Mapping[str, object]) -> "GPTConfig":
        """Read the configuration in a checkpoint's `model_args`. CheckpointError if it is invalid."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        for name in kinds:
            if name not in model_args and name != "activation":
                raise CheckpointError(say("models.model.lacks", name=name))
        for name, value in model_args.items():
            kind = kinds.get(name)
            if kind is None:
                raise CheckpointError(say("models.model.unknown", name=repr(name), known=", ".join(kinds)))
            if type(value) is not kind and (kind is not float or type(value) is not int):
                found = repr(value)
                raise CheckpointError(say("models.model.wrong_type", name=name, wanted=kind.__name__, value=found))
        try:
            return cls(**model_args)  # type: ignore[arg-type]
        except ConfigError as error:
            raise CheckpointError(say("models.model.unusable", reason=error)) from None


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, norm: LayerNorm, cache: KeyValueCache | None, layer: int) -> Tensor:
        qkv = norm_linear(x, norm, self.c_attn)
        if cache is None:
            y = causal_attention(qkv, self.n_head, dropout=self.dropout if self.training else 0.0)
        else:
            y = cached_attention(qkv, self.n_head, cache, layer)
        out: Tensor = self.resid_dropout(plain_linear(y, self.c_proj))
        return out


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor, norm: LayerNorm) -> Tensor:
        widened = norm_linear(x, norm, self.c_fc)
        out: Tensor = self.dropout(gelu_linear(widened, self.c_proj, approximate=self.approximate))
        return out


class Block(nn.Module):
    """One transformer layer: attention and MLP, each after a layer norm, added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(x, self.ln_1, cache, layer)
        x = x + self.mlp(x, self.ln_2)
        return x


def _embedding(count: int, width: int) -> nn.Embedding:
    """Return an embedding; on the meta device without drawing its values, for which torch would load sympy."""
    if torch.empty(0).is_meta:
        embedding: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)
        return embedding
    return nn.Embedding(count, width)


class GPT(nn.Module):
    """The model; `forward` gives the summed loss of given targets, or the logits where there are none."""

    def __init__(
        self,
        config: GPTConfig,
        *,
        loss: LossKind = "auto",
        checkpointed_blocks: int = 0,
        inputs_on_host: bool = False,
    ) -> None:
        """`checkpointed_blocks` of the blocks, from the first, are recomputed in backward.

        With `inputs_on_host` the inputs of those blocks wait in pinned host memory until backward.
        """
        super().__init__()
        self.config = config
        self.loss_kind: LossKind = loss
        self.checkpointed_blocks = checkpointed_blocks
        self.inputs_on_host = inputs_on_host
        self.transformer: Any = nn.ModuleDict(
            {
                "wte": _embedding(config.vocab_size, config.n_embd),
                "wpe": _embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    @classmethod
    def on_device(cls, config: GPTConfig, device: torch.device, **options: Any) -> "GPT":
        """Allocate a model on `device` with its parameters not yet set; `options` go to the constructor."""
        with torch.device("meta"):
            model = cls(config, **options)
        for module in model.modules():  # as `to_empty`, whose `empty_like` of a meta tensor loads sympy
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device)))
        model.transformer["wte"].weight = model.lm_head.weight
        return model

    @torch.no_grad()
    def init_weights(self) -> "GPT":
        """GPT-2's initialisation: 0.02, and 0.02 / sqrt(2 n_layer) where a block adds to the residual stream."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)
        return self

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor) -> Tensor:
        """Fill `tensor` with the first values of the parameter `name`."""
        if tensor.dim() >= 2:
            residual = name.endswith("c_proj.weight")
            return tensor.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        return tensor.fill_(0.0 if name.endswith(".bias") else 1.0)

    def compile_parts(self, mode: str = "default", *, around_hooks: bool = True) -> None:
        """Compile the blocks, which all run the same code, and the loss; `mode` as of `torch.compile`.

        It is as fast as compiling the whole model, takes less memory and is ready in a third of the time. CUDA graphs
        record all blocks together. A chunked loss is not compiled, because that would unroll it. Without `around_hooks`
        hooks of attention and MLP, such as FSDP2's, run outside of compiled code.
        """
        if not around_hooks:
            for part in (part for block in self.transformer["h"] for part in (block.attn, block.mlp)):
                part.forward = torch.compile(part.forward, mode=mode)
        elif mode in CUDA_GRAPH_MODES:
            self._blocks = torch.compile(self._blocks, mode=mode)  # type: ignore[method-assign]
        else:
            for block in self.transformer["h"]:
                block.compile(mode=mode)
        if self.loss_kind == "full":
            self._loss = torch.compile(self._loss, mode=mode)  # type: ignore[method-assign]

    def hidden(self, idx: Tensor) -> Tensor:
        """Final hidden states (b, t, c) of token ids (b, t)."""
        out: Tensor = self.transformer["ln_f"](self._residual(idx))
        return out

    def _residual(self, idx: Tensor, cache: KeyValueCache | None = None, *, loss_follows: bool = False) -> Tensor:
        """The residual stream (b, t, c) after the last block, of token ids (b, t) that follow what `cache` holds."""
        past = 0 if cache is None else cache.length
        t = idx.shape[1]
        if past + t > self.config.block_size:
            raise ConfigError(say("models.model.long_sequence", tokens=past + t, block_size=self.config.block_size))
        positions = torch.arange(past, past + t, device=idx.device)
        wte = self.transformer["wte"]
        tokens = tied_embedding(idx, wte.weight) if loss_follows else wte(idx)
        x: Tensor = self.transformer["drop"](tokens + self.transformer["wpe"](positions))
        if cache is None:
            recomputed = self.checkpointed_blocks if self.training and torch.is_grad_enabled() else 0
            return self._blocks(x, recomputed)
        for layer, block in enumerate(self.transformer["h"]):
            x = block.forward(x, cache, layer)  # a compiled block would be compiled again for each layer
        return x

    def _blocks(self, x: Tensor, recomputed: int) -> Tensor:
        moves = recomputed > 0 and self.inputs_on_host and x.device.type == "cuda"
        for layer, block in enumerate(self.transformer["h"]):
            if layer < recomputed:
                with save_on_cpu(pin_memory=True) if moves else nullcontext():
                    x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
            else:
                x = block(x)
        return x

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        scale: float = 1.0,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """`scale` times the sum of the cross entropies (float32 scalar) over targets (b, t) other than -1.

        Without targets: the logits of the last position, (b, v).
        """
        x = self._residual(idx, cache, loss_follows=targets is not None)
        if targets is None:
            logits: Tensor = self.lm_head(self.transformer["ln_f"](x[:, -1]))
            return logits
        return self._loss(x, targets, scale)

    def _loss(self, x: Tensor, targets: Tensor, scale: float) -> Tensor:
        hidden_nc = self.transformer["ln_f"](x).flatten(0, 1)
        return token_loss(hidden_nc, self.lm_head.weight, targets.flatten(), scale=scale, kind=self.loss_kind)

    def count_parameters(self, *, positions: bool = True) -> int:
        """Parameters; `positions=False` leaves the position embedding out, as nanoGPT counts."""
        count = sum(p.numel() for p in self.parameters())
        return count if positions else count - self.transformer["wpe"].weight.numel()

    def flops_per_token(self, t: int) -> int:
        """FLOPs of forward and backward for one token in sequences of t."""
        return flops_per_token(self.config, t)

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions from `block_size` on."""
        if block_size > self.config.block_size:
            raise ConfigError(
                say("models.model.few_positions", block_size=block_size, positions=self.config.block_size)
            )
        wpe = self.transformer["wpe"]
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        self.config = GPTConfig(**{**asdict(self.config), "block_size": block_size})
