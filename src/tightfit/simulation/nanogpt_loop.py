"""Training loop in nanoGPT's manner, played on the virtual GPU in place of the run that failed.

It decides what such a run allocates, and when: the evaluation comes before the first step, `logits` of one iteration
stay bound while the next is computed, and the loss is taken over all logits at once. `tightfit.simulation.loop_play`
runs it under a file name outside the package, so that its lines count as a user's.
"""

import contextlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit.config import TrainConfig
from tightfit.simulation.requests import LoopSettings

Context = contextlib.AbstractContextManager[object]
Note = Callable[..., None]


class Norm(nn.Module):
    """nanoGPT's LayerNorm, which may lack the bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class Perceptron(nn.Module):
    def __init__(self, width: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = Norm(width, bias), Attention(width, heads, dropout, bias)
        self.ln_2, self.mlp = Norm(width, bias), Perceptron(width, dropout, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Model(nn.Module):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        width, dropout, bias = config.n_embd, config.dropout, config.bias
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.block_size, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, config.n_head, dropout, bias) for _ in range(config.n_layer))
        self.ln_f = Norm(width, bias)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        t = idx.size(1)
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


def on_device(model: nn.Module, device: str) -> nn.Module:
    """Do `model.to(device)` without computing weights on the host first; it meets a tied weight twice, too."""

    def move(t: Tensor) -> Tensor:
        return t if t.device.type != "meta" else torch.empty_like(t, device=device)

    return model._apply(move)  # type: ignore[no-any-return]


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.dim() >= 2], "weight_decay": 0.1},
        {"params": [each for each in parameters if each.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def get_batch(config: TrainConfig, size: int, device: str) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(size, config.block_size, dtype=torch.int64)
    x, y = ids.pin_memory(), ids.clone().pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


@torch.no_grad()
def estimate_loss(
    model: nn.Module, settings: LoopSettings, ctx: Context, device: str, note: Callable[..., None]
) -> None:
    model.eval()
    for split in ("train", "val"):
        losses = torch.zeros(settings.eval_iters)
        for k in range(settings.eval_iters):
            note("eval", split=split, iteration=k)
            X, Y = get_batch(settings.config, settings.config.eval_micro_batch or settings.config.batch_size, device)
            with ctx:
                logits, loss = model(X, Y)
            losses[k] = loss.item()
            if settings.release:
                del logits, loss
    model.train()


def run(settings: LoopSettings, note: Note) -> None:
    """Run an evaluation, the steps, and another evaluation; `note` is called before each part."""
    device, config = "cuda", settings.config
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    ctx: Context = contextlib.nullcontext() if dtype == torch.float32 else torch.amp.autocast(device, dtype=dtype)
    with torch.device("meta"):
        plain = Model(config)
    on_device(plain, device)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    optimizer = optimizer_of(plain, config)
    model: nn.Module = plain
    if config.compile:
        model = cast(nn.Module, torch.compile(plain, mode=None if config.mode == "default" else config.mode))
    assessed = plain if settings.evaluate == "eager" else model

    X, Y = get_batch(config, config.batch_size, device)
    for step in range(settings.steps + 1):
        if settings.evaluate != "none" and step in (0, settings.steps):
            estimate_loss(assessed, settings, ctx, device, note)
        if step == settings.steps:
            break
        for number in range(settings.passes):
            note("pass", step=step, number=number)
            with ctx:
                logits, loss = model(X, Y)  # noqa: RUF059  (nanoGPT keeps them bound)
                loss = loss / config.gradient_accumulation_steps
            X, Y = get_batch(config, config.batch_size, device)
            scaler.scale(loss).backward()
        note("update", step=step)
        if config.grad_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        note("stepped", step=step)
