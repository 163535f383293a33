"""The same training step twice: on virtual host tensors through the recorder, and for real under PyTorch's profiler.

What is compared is the step's highest memory above what is held between steps, in bytes, of the second step.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tightfit.allocator.caching import CachingAllocator
from tightfit.kernels.card import Card
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer
from tightfit.vgpu.autotuning import Trials
from tightfit.vgpu.compiled import Compiler
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches import backend, inductor
from tightfit.vgpu.phases import Phases

VOCABULARY, BLOCK, BATCH = 4096, 128, 4
WIDE = 1 << 50


@dataclass(frozen=True)
class Configuration:
    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    optimizer: str = "fused"
    bf16: bool = False
    accumulation: int = 1
    compiled: str = ""
    """`whole`, as scripts do it, or in `parts`, as this trainer does."""


def tightfit_model(**options: Any) -> Callable[[], nn.Module]:
    loss = options.pop("loss", "full")
    checkpointed = options.pop("checkpointed", 0)
    config = GPTConfig(block_size=BLOCK, vocab_size=VOCABULARY, n_layer=3, n_head=4, n_embd=128, **options)

    def build() -> nn.Module:
        return GPT(config, loss=loss, checkpointed_blocks=checkpointed)

    return build


def tightfit_loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(ids, ids, scale=1.0 / ids.numel())
    return loss


def transformers_model(kind: str, *, checkpointing: bool = False) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        configs = {
            "gpt2": lambda: transformers.GPT2Config(
                n_layer=2, n_head=4, n_embd=128, vocab_size=VOCABULARY, n_positions=BLOCK
            ),
            "llama": lambda: transformers.LlamaConfig(
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                hidden_size=128,
                intermediate_size=344,
                vocab_size=VOCABULARY,
            ),
        }
        model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # another name from transformers 6 on
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        return model  # type: ignore[no-any-return]

    return build


def transformers_loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _optimizer(configuration: Configuration, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    match configuration.optimizer:
        case "fused":
            return build_optimizer(model.parameters(), weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95))
        case "foreach":
            return torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
        case "single":
            return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
        case "sgd":
            return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, foreach=False)
        case "adafactor":
            return torch.optim.Adafactor(parameters, lr=1e-3, foreach=False)
    raise AssertionError(configuration.optimizer)


def _step(configuration: Configuration, model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    for _ in range(configuration.accumulation):
        context = torch.autocast("cpu", dtype=torch.bfloat16) if configuration.bf16 else contextlib.nullcontext()
        with context:
            loss = configuration.loss(model, ids)
        loss.backward()
        del loss
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(configuration: Configuration) -> int:
    """Bytes by PyTorch's profiler, of a real second step."""
    torch.manual_seed(0)
    model = configuration.build()
    optimizer = _optimizer(configuration, model)
    ids = torch.randint(0, VOCABULARY, (BATCH, BLOCK))
    called = _compiled(model, configuration.compiled)
    _step(configuration, called, optimizer, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.11 on its own cycles
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _step(configuration, called, optimizer, ids)
    assert profiler.profiler is not None
    everything = profiler.profiler.kineto_results.events()
    events = [event for event in everything if event.name() == "[memory]"]
    if configuration.compiled:
        events = _without_scratch(events, everything)
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert len(events) > 100
    return peak


def _compiled(model: nn.Module, how: str) -> Any:
    """Compiled as in a process of its own: Dynamo remembers the shapes that a function was called with before."""
    if not how:
        return model
    torch._dynamo.reset()
    if how == "whole":
        return torch.compile(model)
    model.compile_parts()
    return model


def _without_scratch(events: list[Any], everything: Any) -> list[Any]:
    """Memory events but for those within a matrix product of a compiled graph.

    Its result is made before it is called, so what oneDNN takes there to reorder operands is the host's alone.
    """
    graphs = _spans(event for event in everything if event.name().startswith("## Call CompiledFxGraph"))
    products = _spans(
        event
        for event in everything
        if event.name() in ("aten::mm", "aten::addmm", "aten::bmm") and _is_within(event, graphs)
    )
    assert products, "a compiled graph with no product, or a profiler that names it otherwise"
    scratch = [event for event in events if _is_within(event, products)]
    assert sum(event.nbytes() for event in scratch) == 0
    return [event for event in events if event not in scratch]


def _spans(events: Iterable[Any]) -> list[tuple[int, int]]:
    return [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in events]


def _is_within(event: Any, spans: list[tuple[int, int]]) -> bool:
    return any(start <= event.start_ns() <= end for start, end in spans)


def predicted(configuration: Configuration) -> int:
    """Bytes requested on virtual host tensors, of the second step."""
    phases = Phases(lambda: None)
    card = Card(capability=(8, 0), sm_count=108)
    device = VirtualDevice(card, CachingAllocator(total_bytes=WIDE), phases, "cpu")
    backend.answer_for_fake_tensors()
    with device.mode():
        model = configuration.build()
        optimizer = _optimizer(configuration, model)
        ids = torch.zeros(BATCH, BLOCK, dtype=torch.int64)
        if configuration.compiled:
            inductor.hide_mode_from_dynamo()
        with mock.patch(
            "torch.compile",
            partial(torch.compile, backend=Compiler(device, Trials(device, lambda: 0), lambda: None).backend),
        ):
            called = _compiled(model, configuration.compiled)
        _step(configuration, called, optimizer, ids)
        device.recorder.settle()
        before = _requested(device)
        first = len(device.recorder.events)
        _step(configuration, called, optimizer, ids)
        device.recorder.settle()
        assert not device.not_modelled, device.not_modelled
    now = peak = before
    for number in device.recorder.events[first:]:
        nbytes = device.recorder.allocations[abs(number) - 1].nbytes
        now += nbytes if number > 0 else -nbytes
        peak = max(peak, now)
    return peak - before


def _requested(device: VirtualDevice) -> int:
    alive = device.recorder.alive_at(len(device.recorder.events))
    return sum(allocation.nbytes for allocation in alive)


def _configurations() -> list[Configuration]:
    found = []
    for bf16 in (False, True):
        kind = "bf16" if bf16 else "fp32"
        for optimizer in ("fused", "foreach", "single", "sgd"):
            found.append(
                Configuration(f"tightfit {kind} {optimizer}", tightfit_model(), tightfit_loss, optimizer, bf16)
            )
        for name, options in (
            ("dropout", {"dropout": 0.1}),
            ("no bias", {"bias": False}),
            ("tanh", {"activation": "gelu_tanh"}),
            ("chunked", {"loss": "chunked"}),
            ("checkpointed", {"checkpointed": 3}),
            ("checkpointed 1", {"checkpointed": 1}),
            ("checkpointed dropout", {"checkpointed": 3, "dropout": 0.1}),
            ("chunked checkpointed", {"loss": "chunked", "checkpointed": 3}),
        ):
            found.append(Configuration(f"tightfit {kind} {name}", tightfit_model(**options), tightfit_loss, bf16=bf16))
        for name, how, options in (
            ("full compiled", "whole", {"loss": "full"}),
            ("full compiled in parts", "parts", {"loss": "full"}),
            ("chunked compiled in parts", "parts", {"loss": "chunked"}),
            ("checkpointed compiled in parts", "parts", {"loss": "full", "checkpointed": 2}),
        ):
            model = tightfit_model(**options)
            found.append(Configuration(f"tightfit {kind} {name}", model, tightfit_loss, bf16=bf16, compiled=how))
        for loss in ("full", "chunked"):
            found.append(
                Configuration(
                    f"tightfit {kind} {loss} accumulated",
                    tightfit_model(loss=loss),
                    tightfit_loss,
                    bf16=bf16,
                    accumulation=3,
                )
            )
        for model in ("gpt2", "llama"):
            for optimizer in ("foreach", "single", "sgd"):
                found.append(
                    Configuration(
                        f"{model} {kind} {optimizer}", transformers_model(model), transformers_loss, optimizer, bf16
                    )
                )
            found.append(
                Configuration(
                    f"{model} {kind} checkpointed",
                    transformers_model(model, checkpointing=True),
                    transformers_loss,
                    "foreach",
                    bf16,
                )
            )
    return found


CONFIGURATIONS = _configurations()
