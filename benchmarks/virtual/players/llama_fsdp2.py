"""A Llama 3 trained with FSDP2, on the virtual device that the caller has made active.

Shapes and choices are those that torchtitan publishes for its tables: a group for each block, reshard after forward
but for the last one, bfloat16 weights and float32 sums, selective or full activation checkpointing, logits in float32
for the loss, which is not compiled, gradients clipped, AdamW with foreach. Two things differ by date, as torchtitan's
and torch's sources have them: RMSNorm in parts, and logits that are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int


SHAPES = {
    "llama3-8b": Shape(32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": Shape(80, 8192, 64, 8, 28672, 128256),
    "llama2-7b": Shape(32, 4096, 32, 32, 11008, 32000),
    "llama2-13b": Shape(40, 5120, 40, 40, 13824, 32000),
    "llama2-70b": Shape(80, 8192, 64, 8, 28672, 32000),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head = shape.width // shape.heads
        self.repeats = shape.heads // shape.kv_heads
        self.wq = nn.Linear(shape.width, shape.heads * self.head, bias=False)
        self.wk = nn.Linear(shape.width, shape.kv_heads * self.head, bias=False)
        self.wv = nn.Linear(shape.width, shape.kv_heads * self.head, bias=False)
        self.wo = nn.Linear(shape.heads * self.head, shape.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.head) for f in (self.wq, self.wk, self.wv))
        q, k = turned(q, k, turns)
        if self.repeats > 1:
            k, v = (each[:, :, :, None].expand(-1, -1, -1, self.repeats, -1).flatten(2, 3) for each in (k, v))
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)), is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(b, t, -1))


def turned(q: Tensor, k: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
    """Return both turned, with all of their complex and float32 copies held to the end, as torchtitan's are."""
    copies = [[torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) for x in (q, k)]]
    copies += [[torch.view_as_real(x * turns[: x.shape[1], None]).flatten(3) for x in copies[0]]]
    return tuple(wide.type_as(x) for wide, x in zip(copies[1], (q, k), strict=True))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.hidden, bias=False)
        self.w2 = nn.Linear(shape.hidden, shape.width, bias=False)
        self.w3 = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class NormInParts(nn.Module):
    """RMSNorm as torch had it up to 2.7: float32 copies by one operator after another, and no fused one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def norm(shape: Shape, torch_version: str) -> nn.Module:
    parts = tuple(int(part) for part in torch_version.split("."))
    return NormInParts(shape.width) if parts < (2, 8) else nn.RMSNorm(shape.width, eps=1e-5)


class Block(nn.Module):
    def __init__(self, shape: Shape, torch_version: str) -> None:
        super().__init__()
        self.attention, self.feed = Attention(shape), FeedForward(shape)
        self.norm1, self.norm2 = norm(shape, torch_version), norm(shape, torch_version)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), turns)
        return x + self.feed(self.norm2(x))


class Checkpointed(nn.Module):
    """A block that recomputes all of itself, or what a selective policy does not save."""

    def __init__(self, block: nn.Module, kind: str) -> None:
        super().__init__()
        self.block, self.kind = block, kind

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        if self.kind == "none":
            return self.block(x, turns)
        contexts = {"context_fn": selective} if self.kind == "selective" else {}
        return checkpoint(self.block, x, turns, use_reentrant=False, preserve_rng_state=False, **contexts)


SAVED = {
    aten.mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def selective() -> Any:
    """Save attention and every other matrix product."""
    seen = {"forward": 0, "recompute": 0}

    def policy(context: Any, func: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        mode = "recompute" if context.is_recompute else "forward"
        if func == aten.mm.default:
            seen[mode] += 1
        keeps = func in SAVED and not (func == aten.mm.default and seen[mode] % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Llama(nn.Module):
    def __init__(self, shape: Shape, layers: int, kind: str, torch_version: str, *, returns_float: bool) -> None:
        super().__init__()
        self.returns_float = returns_float
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Checkpointed(Block(shape, torch_version), kind) for _ in range(layers))
        self.norm, self.output = norm(shape, torch_version), nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, ids: Tensor, turns: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, turns)
        logits = self.output(self.norm(x))
        return logits.float() if self.returns_float else logits


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))


def train(
    name: str, *, layers: int, cards: int, batch: int, length: int, checkpointing: str, compiled: bool,
    torch_version: str, keeps_logits: bool, read: Callable[[], Any],
) -> list[Any]:  # fmt: skip
    """Train for three steps, one pass each; return what `read` gives after each part of the last one."""
    shape = SHAPES[name]
    torch.distributed.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (cards,))
    with torch.device("meta"):
        # Until June 2024 the model returned float32, and the logits outlived the backward pass and the next forward.
        model = Llama(shape, layers, checkpointing, torch_version, returns_float=keeps_logits)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for number, block in enumerate(model.blocks):
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=number < layers - 1)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cuda")
    turns = torch.zeros(length, shape.width // shape.heads // 2, dtype=torch.complex64, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    found = []
    ids = partial(torch.zeros, batch, length, dtype=torch.int64, device="cuda")
    for _ in range(3):
        found = [read()]
        optimizer.zero_grad()
        logits = model(ids(), turns)
        loss = loss_of(logits, ids())
        if not keeps_logits:
            del logits
        loss.backward()
        found.append(read())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        found.append(read())
    return found
