"""A training loop in nanoGPT's manner: estimate_loss() first, the logits bound to a name, data from a memmap.

usage: nanogpt_like.py [--key=value ...] with the keys below
"""

import contextlib
import math
import sys

import torch
from torch import nn
from torch.nn import functional as F

settings = {
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "vocab_size": 50304,
    "eval_iters": 200,
    "max_iters": 1000,
    "accumulation": 1,
    "compile": 0,
    "bf16": 1,
    "masks": 0,  # attention written out, with a buffer of the causal mask in each layer, as before torch 2.0
}
for word in sys.argv[1:]:
    key, value = word.removeprefix("--").split("=")
    settings[key] = int(value)
batch_size, block_size, width = settings["batch_size"], settings["block_size"], settings["n_embd"]


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        if settings["masks"]:
            mask = torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size)
            self.register_buffer("bias", mask)

    def forward(self, x):
        b, t, c = x.size()
        heads = settings["n_head"]
        q, k, v = (part.view(b, t, heads, c // heads).transpose(1, 2) for part in self.c_attn(x).split(c, dim=2))
        if settings["masks"]:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = Norm(), Attention(), Norm()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(settings["vocab_size"], width)
        self.wpe = nn.Embedding(block_size, width)
        self.h = nn.ModuleList(Block() for _ in range(settings["n_layer"]))
        self.ln_f = Norm()
        self.lm_head = nn.Linear(width, settings["vocab_size"], bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx, targets):
        tok_emb = self.wte(idx)
        pos_emb = self.wpe(torch.arange(idx.size(1), device=idx.device))
        x = tok_emb + pos_emb
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


def get_batch():
    ids = torch.randint(settings["vocab_size"], (batch_size, block_size + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return (each.pin_memory().to("cuda", non_blocking=True) for each in (x, y))


device_type = "cuda"
ctx = torch.amp.autocast(device_type, dtype=torch.bfloat16) if settings["bf16"] else contextlib.nullcontext()
model = Model()
model.to("cuda")
optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
if settings["compile"]:
    model = torch.compile(model, mode={0: None, 1: None, 2: "reduce-overhead"}[settings["compile"]])


@torch.no_grad()
def estimate_loss():
    model.eval()
    means = {}
    for split in ("train", "val"):
        losses = torch.zeros(settings["eval_iters"])
        for k in range(settings["eval_iters"]):
            X, Y = get_batch()
            with ctx:
                logits, loss = model(X, Y)
            losses[k] = loss.item()
        means[split] = losses.mean()
    model.train()
    return means


X, Y = get_batch()
for step in range(settings["max_iters"]):
    if step % 100 == 0:
        print(f"step {step}: {estimate_loss()}")
    for _ in range(settings["accumulation"]):
        with ctx:
            logits, loss = model(X, Y)
            loss = loss / settings["accumulation"]
        X, Y = get_batch()
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
