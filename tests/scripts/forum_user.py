"""What people post: memory printed everywhere, masks and indices on the device, a retry when memory runs out."""

import argparse
import copy
import gc
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=4096)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--fraction", type=float, default=0.9)
parser.add_argument("--no-retry", action="store_true")
args = parser.parse_args()

device = torch.device("cuda:0")
GB = 1024**3


def report(title):
    free, total = torch.cuda.mem_get_info()
    print(
        f"[{title}] allocated {torch.cuda.memory_allocated() / GB:.2f} GB, max {torch.cuda.max_memory_allocated() / GB:.2f}"
        f" GB, reserved {torch.cuda.memory_reserved() / GB:.2f} GB, free {free / GB:.2f} of {total / GB:.2f} GB"
    )


class Net(nn.Module):
    def __init__(self, width=2048, classes=1000):
        super().__init__()
        self.embed = nn.Embedding(5000, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x)


def train(batch_size):
    torch.manual_seed(1)
    torch.cuda.manual_seed_all(1)
    model = Net().cuda()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    generator = torch.Generator(device="cuda").manual_seed(2)
    weights = torch.tensor([0.1] * 1000, device="cuda")
    side = torch.cuda.Stream()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for step in range(args.steps):
        start.record()
        order = torch.randperm(5000, device="cuda", generator=generator)
        tokens = torch.randint(0, 5000, (batch_size,), device="cuda", generator=generator)
        tokens = order[tokens]
        target = torch.randint(0, 1000, (batch_size,), device=device)
        keep = tokens > 100
        logits = model(tokens)
        logits = logits.masked_fill(torch.isnan(logits), 0.0)
        kept = logits[keep]
        if kept.shape[0] == 0:
            continue
        loss = F.cross_entropy(kept, target[keep], weight=weights)
        one_hot = F.one_hot(target, 1000)
        penalty = torch.where(one_hot.bool(), logits, torch.zeros_like(logits)).pow(2).mean()
        total = loss + 0.01 * penalty
        if not torch.isfinite(total):
            raise RuntimeError("the loss is not finite")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
                mine.mul_(0.99).add_(theirs, alpha=0.01)
        with torch.cuda.stream(side), torch.no_grad():
            top = logits.topk(5, dim=-1)
            hits = (top.indices == target[:, None]).any(dim=-1)
            wrong = torch.nonzero(~hits).squeeze(1)
            rows, columns = torch.where(one_hot > 0)
            confusion = torch.bincount(target * 1000 + logits.argmax(-1), minlength=1000 * 1000)
            classes, counts = torch.unique(target, return_counts=True)
            picked = torch.masked_select(logits, one_hot.bool())
            repeated = torch.repeat_interleave(
                torch.arange(4, device="cuda"), torch.tensor([1, 2, 3, 4], device="cuda")
            )
        torch.cuda.current_stream().wait_stream(side)
        end.record()
        torch.cuda.synchronize()
        value = total.item()
        if value < best:
            best = value
        print(
            f"step {step}: loss {value:.4f} ({total:.3f}), best {best:.4f}, {start.elapsed_time(end):.2f} ms,"
            f" accuracy {hits.float().mean().item():.3f}, wrong {len(wrong)}, classes {len(classes)}"
        )
    print(logits, weights[:3].tolist(), counts.sum().item(), confusion.sum().cpu().numpy())
    print(logits[0].detach().cpu().numpy().shape, picked.shape, rows.shape, columns.shape, repeated.shape)
    print(F.softmax(logits[0], -1).max(), tokens[:5].tolist(), list(target[:2]))
    return best


properties = torch.cuda.get_device_properties(0)
print(torch.cuda.get_device_name(0), f"{properties.total_memory / GB:.2f} GB", properties.multi_processor_count)
print(torch.accelerator.current_accelerator(), torch.accelerator.is_available(), torch.accelerator.device_count())
torch.cuda.set_per_process_memory_fraction(args.fraction, 0)
torch.cuda.reset_peak_memory_stats()
began = time.time()
batch_size = args.batch_size
while True:
    try:
        best = train(batch_size)
        break
    except torch.OutOfMemoryError as error:
        if args.no_retry:
            raise
        message = str(error)
    print(f"batch size {batch_size} does not fit ({message.splitlines()[0][:60]}); trying half of it")
    batch_size //= 2
    gc.collect()
    torch.cuda.empty_cache()
report("after training")
print(torch.cuda.memory_summary(abbreviated=True))
torch.cuda.reset_peak_memory_stats()
torch.accelerator.synchronize()
print(torch.accelerator.memory_allocated(), torch.accelerator.max_memory_allocated())
print(
    f"batch size {batch_size}, best {best:.4f}, {time.time() - began:.1f} s, {torch.cuda.memory_stats()['num_ooms']} ooms"
)
