"""Play training programs that a random number generator puts together, and compare their peaks with those played whole.

    python benchmarks/virtual/random_programs.py --first 0 --count 50 [--jobs 2]

Each program has a data set (samples of one length or of many), a way of looping (epochs, steps, a class, functions)
and some habits of public training scripts: accumulation, validation, EMA, unfreezing, a memory bank, growing lengths,
sampling, phases one after the other, and a guard such as `if torch.isnan(loss):`. The truth is the same virtual GPU
that passes over nothing, so this shows only what is lost by passing over iterations. One row a program: `right`,
`above` (by at most 5%), `listed` (another peak, and lines named that were not played) or `WRONG`. "blocks" stands
where as much was requested, and the blocks for it are larger or smaller, as other tensors lay before them.
"""

import argparse
import os
import random
import sys
import tempfile
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

GPU = "A100 SXM 80GB"
CLOSE = 0.002
"""Share of the peak by which a play may be off and still be right."""
ABOVE = 1.05
"""Share of the peak up to which a play is above it: a longer batch came together with something else."""

HEAD = """\
import collections, copy, itertools, math, os, random, time
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

torch.manual_seed({seed})
random.seed({seed})
device = torch.device("cuda")
VOCAB = {vocab}
EPOCHS = {epochs}
BATCH = {batch}


class Net(nn.Module):
    def __init__(self, width={width}, depth={depth}):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB)

    def features(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.norm(h)

    def forward(self, x):
        return self.head(self.features(x))


"""

DATA = (
    """
    tokens = torch.randint(VOCAB, ({samples}, {length} + 1))
    train_data = TensorDataset(tokens[:, :-1], tokens[:, 1:])
    test_data = TensorDataset(tokens[: {samples} // 5, :-1], tokens[: {samples} // 5, 1:])
    train_loader = DataLoader(train_data, batch_size=BATCH, shuffle=True{drop_last})
    test_loader = DataLoader(test_data, batch_size={test_batch})
    """,
    """
    class Texts(Dataset):
        def __init__(self, count, longest):
            rng = random.Random(count)
            self.texts = [torch.randint(VOCAB, (rng.randrange(4, longest),)) for _ in range(count)]

        def __len__(self):
            return len(self.texts)

        def __getitem__(self, index):
            return self.texts[index]


    def collate(texts):
        x = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return x[:, :-1], x[:, 1:]


    train_loader = DataLoader(Texts({samples}, {length}), batch_size=BATCH, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(Texts({samples} // 5, {length}), batch_size={test_batch}, collate_fn=collate)
    """,
    """
    class Blocks:
        \"\"\"Batches as a list of one's own.\"\"\"

        def __init__(self, count, size):
            self.data = torch.randint(VOCAB, (count, {length} + 1))
            self.size = size

        def __len__(self):
            return math.ceil(len(self.data) / self.size)

        def __iter__(self):
            order = torch.randperm(len(self.data))
            for start in range(0, len(order), self.size):
                chosen = self.data[order[start : start + self.size]]
                yield chosen[:, :-1], chosen[:, 1:]


    train_loader = Blocks({samples}, BATCH)
    test_loader = Blocks({samples} // 5, {test_batch})
    """,
)


class Habit(NamedTuple):
    """Lines of a habit, by where they stand; `step`, `epoch`, `i` are the counters."""

    setup: str = ""
    before: str = ""
    """After `loss`, before the backward pass."""
    after: str = ""
    """After the optimizer's step."""
    each_epoch: str = ""
    end: str = ""


EVALUATIONS = (
    """
    def evaluate(net, loader):
        net.eval()
        total = count = 0
        with torch.no_grad():
            for x, y in loader:
                x, y = x.to(device), y.to(device)
                logits = net(x)
                total += F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
                count += 1
        net.train()
        return total / count
    """,
    """
    @torch.inference_mode()
    def evaluate(net, loader):
        net.eval()
        outputs, targets = [], []
        for x, y in loader:
            outputs.append(net(x.to(device)).flatten(0, 1))
            targets.append(y.to(device).flatten())
        net.train()
        return F.cross_entropy(torch.cat(outputs), torch.cat(targets)).item()
    """,
    """
    def evaluate(net, loader):
        net.eval()
        losses = []
        for x, y in loader:
            logits = net(x.to(device))
            losses.append(F.cross_entropy(logits.flatten(0, 1), y.to(device).flatten()).detach())
        net.train()
        return torch.stack(losses).mean().item()
    """,
)

HABITS = (
    Habit(setup="scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)", after="scheduler.step()"),
    Habit(
        after="""
            if step % {often} == 0:
                print(epoch, step, loss.item())
            """
    ),
    Habit(setup="history = []", after="history.append(loss.item())", end="print(sum(history) / len(history))"),
    Habit(setup="history = []", after="history.append(loss.detach())", end="print(torch.stack(history).mean().item())"),
    Habit(
        setup="kept = []",
        after="kept.append(logits.detach())",
        each_epoch="""
            print(torch.cat([k.flatten(0, 1) for k in kept]).mean().item())
            kept.clear()
            """,
    ),
    Habit(
        setup="kept = []",
        after="""
            if step % {often} == 0:
                kept.append(logits.detach()[:, :1])
            """,
    ),
    Habit(each_epoch="print('validation', evaluate(net, test_loader))"),
    Habit(
        after="""
            if step % {seldom} == 0:
                print('validation', evaluate(net, test_loader))
            """
    ),
    Habit(
        setup="best, best_state = float('inf'), None",
        each_epoch="""
            value = evaluate(net, test_loader)
            if value < best:
                best, best_state = value, copy.deepcopy(net.state_dict())
            """,
        end="""
            if best_state is not None:
                net.load_state_dict(best_state)
            print(evaluate(net, test_loader))
            """,
    ),
    Habit(
        setup="ema = None",
        after="""
            if step >= {moment}:
                if ema is None:
                    ema = copy.deepcopy(net)
                with torch.no_grad():
                    for a, b in zip(ema.parameters(), net.parameters()):
                        a.lerp_(b, 0.01)
            """,
        end="""
            if ema is not None:
                print(evaluate(ema, test_loader))
            """,
    ),
    Habit(
        setup="""
            for p in net.embed.parameters():
                p.requires_grad = False
            """,
        each_epoch="""
            if epoch == {late}:
                for p in net.embed.parameters():
                    p.requires_grad = True
            """,
    ),
    Habit(
        setup="bank = collections.deque(maxlen={many})",
        before="""
            with torch.no_grad():
                bank.append(net.features(x).mean(1))
            keys = torch.cat(tuple(bank))
            loss = loss + (net.features(x).mean(1) @ keys.T).logsumexp(1).mean()
            """,
    ),
    Habit(
        before="""
            if epoch >= {late}:
                noisy = net(torch.randint_like(x, VOCAB))
                loss = loss + F.mse_loss(noisy, logits.detach())
            """
    ),
    Habit(
        before="""
            if step > {moment}:
                loss = loss + 0.1 * F.kl_div(F.log_softmax(net(x), -1), F.softmax(logits, -1), reduction='batchmean')
            """
    ),
    Habit(
        after="""
            if step % {seldom} == {seldom} - 1:
                h = net.features(x).detach().requires_grad_()
                out = net.head(h).sum()
                (g,) = torch.autograd.grad(out, h, create_graph=True)
                g.pow(2).sum().backward()
                optimizer.zero_grad()
            """
    ),
    Habit(
        setup="""
            @torch.no_grad()
            def sample(net, count, n={long}):
                net.eval()
                text = torch.zeros(count, 1, dtype=torch.long, device=device)
                for _ in range(n):
                    logits = net(text)
                    text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
                net.train()
                return text
            """,
        each_epoch="sample(net, 4)",
    ),
    Habit(
        setup="""
            def save(step):
                torch.save({'model': net.state_dict(), 'optimizer': optimizer.state_dict(), 'step': step}, 'last.pt')
            """,
        after="""
            if step > 0 and step % {seldom} == 0:
                save(step)
            """,
        end="""
            save(step)
            state = torch.load('last.pt', map_location=device)
            net.load_state_dict(state['model'])
            """,
    ),
    Habit(
        end="""
            for p in net.blocks.parameters():
                p.requires_grad = False
            head_optimizer = torch.optim.AdamW(net.head.parameters())
            for tuning in range(2):
                for x, y in train_loader:
                    x, y = x.to(device), y.to(device)
                    loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
                    head_optimizer.zero_grad()
                    loss.backward()
                    head_optimizer.step()
            """,
    ),
    Habit(
        setup="swa = torch.optim.swa_utils.AveragedModel(net)",
        each_epoch="""
            if epoch > {late}:
                swa.update_parameters(net)
            """,
        end="print(evaluate(swa, test_loader))",
    ),
    Habit(
        setup="patience, worst = 0, float('inf')",
        each_epoch="""
            value = evaluate(net, test_loader)
            patience = 0 if value < worst else patience + 1
            worst = min(value, worst)
            print(patience)
            """,
    ),
    Habit(
        each_epoch="""
            print(torch.cuda.max_memory_allocated())
            torch.cuda.empty_cache()
            if epoch == {late}:
                for group in optimizer.param_groups:
                    group['lr'] *= 0.1
            """,
    ),
    Habit(
        setup="replay = []",
        after="""
            if len(replay) < {many}:
                replay.append((x, y))
            else:
                replay[random.randrange(len(replay))] = (x, y)
            if len(replay) == {many}:
                old_x, old_y = replay[0]
                F.cross_entropy(net(old_x).flatten(0, 1), old_y.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
            """,
    ),
    Habit(
        setup="teacher = copy.deepcopy(net).eval()",
        before="""
            with torch.no_grad():
                target = teacher(x)
            loss = loss + F.mse_loss(logits, target)
            """,
        each_epoch="""
            if epoch % 2:
                teacher.load_state_dict(net.state_dict())
            """,
    ),
    Habit(
        setup="""
            critic = nn.Sequential(nn.Linear(VOCAB, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)
            critic_optimizer = torch.optim.Adam(critic.parameters())
            """,
        after="""
            if step >= {moment}:
                score = critic(logits.detach()).mean()
                critic_optimizer.zero_grad()
                score.backward()
                critic_optimizer.step()
            """,
    ),
    Habit(
        each_epoch="""
            confusion = torch.zeros(512, 512, device=device)
            with torch.no_grad():
                for x, y in test_loader:
                    guess = net(x.to(device)).argmax(-1).flatten()
                    found = y.to(device).flatten() % 512, guess % 512
                    confusion.index_put_(found, torch.ones(guess.shape, device=device), accumulate=True)
            print(confusion.diag().sum().item())
            """,
    ),
    Habit(
        after="""
            worst_losses = F.cross_entropy(logits.detach().flatten(0, 1), y.flatten(), reduction='none')
            hard = worst_losses.topk(4).indices
            if step % {often} == 1:
                print(hard.tolist())
            """,
    ),
    Habit(
        end="""
            big_loader = DataLoader(TensorDataset(torch.randint(VOCAB, ({samples}, {long}))), batch_size={big})
            with torch.no_grad():
                for (x,) in big_loader:
                    net(x.to(device))
            """,
    ),
)

GUARD_SETUP = """
class Due:
    def __init__(self, every):
        self.every, self.count = every, 0

    def __call__(self):
        self.count += 1
        return self.count % self.every == 0


class Plateau:
    def __init__(self, patience):
        self.patience, self.best, self.bad = patience, float("inf"), 0

    def step(self, value):
        self.bad = 0 if value < self.best else self.bad + 1
        self.best = min(value, self.best)
        return self.bad > self.patience


def unwrapped(net):
    return net.module if hasattr(net, "module") else net


def is_main():
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    return torch.distributed.get_rank() == 0


def has_started(step, warmup=({moment})):
    if warmup <= 0:
        return True
    return step >= warmup


due, plateau, settings = Due({seldom}), Plateau({many}), {"debug": False, "mode": "train", "ratio": 0.5}
begun = time.time()
"""
GUARDS = (
    "logits.shape[1] == 6",
    "logits.shape[:2] != y.shape",
    "logits.dtype == torch.float16",
    "isinstance(logits, (tuple, list)) or hasattr(net, 'module')",
    "getattr(net, 'config', None) is not None",
    "torch.isnan(loss).any() or not math.isfinite(loss.item())",
    "loss.item() > 1e4",
    "loss > 1e6 and is_main()",
    "is_main() and step % {seldom} == {few}",
    "not is_main() or settings['debug']",
    "settings.get('mode') == 'train' and step == {moment}",
    "has_started(step) and isinstance(loss, torch.Tensor)",
    "due()",
    "due() and not torch.isnan(loss)",
    "plateau.step(loss.item())",
    "time.time() - begun > 36000",
    "unwrapped(net).training and epoch == {late}",
    "any(p.dtype == torch.float16 for p in net.parameters())",
    "len(optimizer.param_groups) > 3",
    "optimizer.param_groups[0]['lr'] < 1e-9",
    "step in ({moment}, {many})",
    "os.path.exists('stop')",
    "x.size(0) == 1 and x.device.type == 'cuda'",
    "f'{epoch}' == '2' and i == 1",
)
"""Conditions of which some never hold, some always, some now and then."""
GUARDED = (
    "loss = loss + net(x.repeat(3, 1)).mean()",
    "loss = loss + torch.cat([logits, logits, logits]).pow(2).mean()",
    "print(evaluate(net, test_loader))",
    "logits = torch.cat([logits] * 6)[: len(logits)]",
)

LENGTHS = (
    "",
    "",
    "",
    "x, y = x[:, : 4 + 4 * epoch], y[:, : 4 + 4 * epoch]",
    """
            now = min(x.shape[1], 4 + step // {often})
            x, y = x[:, :now], y[:, :now]
            """,
    """
            if step < {moment}:
                x, y = x[: len(x) // 2 + 1], y[: len(y) // 2 + 1]
            """,
)

TRAIN = """\
x, y = x.to(device), y.to(device)
{lengths}
logits = net(x)
loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
{before}
{update}
{after}
"""

UPDATES = (
    """
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            """,
    """
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            """,
    """
            (loss / {few}).backward()
            if (i + 1) % {few} == 0 or i + 1 == len(train_loader):
                optimizer.step()
                optimizer.zero_grad()
            """,
    """
            (loss / {few}).backward()
            if (step + 1) % {few} == 0:
                optimizer.step()
                optimizer.zero_grad()
            """,
)

LOOPS = (
    """
    step = 0
    for epoch in range(EPOCHS):
        net.train()
        for i, (x, y) in enumerate(train_loader):
            {train}
            step += 1
        {each_epoch}
    {end}
    """,
    """
    batches = iter(train_loader)
    step = epoch = i = 0
    while step < EPOCHS * len(train_loader):
        try:
            x, y = next(batches)
        except StopIteration:
            {each_epoch}
            epoch += 1
            i = 0
            batches = iter(train_loader)
            x, y = next(batches)
        {train}
        step += 1
        i += 1
    {end}
    """,
    """
    def train_epoch(epoch):
        global step{globals}
        net.train()
        for i, (x, y) in enumerate(train_loader):
            {train}
            step += 1
        return loss.item()


    step = 0
    for epoch in range(EPOCHS):
        print(epoch, train_epoch(epoch))
        {each_epoch}
    {end}
    """,
    """
    def cycle(loader):
        while True:
            yield from loader


    epoch = i = 0
    for step, (x, y) in zip(range(EPOCHS * len(train_loader)), cycle(train_loader)):
        i, epoch = step % len(train_loader), step // len(train_loader)
        {train}
        if (step + 1) % len(train_loader) == 0:
            {each_epoch}
    {end}
    """,
    """
    def main():
        global step{globals}
        for epoch in range(EPOCHS):
            running = 0.0
            for i, batch in enumerate(train_loader):
                x, y = batch
                {train}
                running += loss.item()
                step += 1
            print(epoch, running / len(train_loader))
            {each_epoch}
        {end}


    step = 0
    if __name__ == "__main__":
        main()
    """,
)

OPTIMIZERS = (
    "optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)",
    "optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)",
    """
    head = {{id(p) for p in net.head.parameters()}}
    rest = [p for p in net.parameters() if id(p) not in head]
    optimizer = torch.optim.Adam([{{'params': net.head.parameters()}}, {{'params': rest}}])
    """,
)


def filled(template: str, parts: dict[str, str]) -> str:
    """Put blocks of lines where `{name}` stands alone on a line, with that line's indent; drop empty ones."""
    lines = []
    for line in textwrap.dedent(template).strip("\n").splitlines():
        word = line.strip()
        if word.startswith("{") and word.endswith("}") and word[1:-1] in parts:
            lines += textwrap.indent(parts[word[1:-1]], line[: len(line) - len(word)]).splitlines()
        else:
            lines.append(line)
    return "\n".join(lines)


def script(seed: int) -> str:
    """Write one program."""
    rng = random.Random(seed)
    choose = rng.choice
    numbers = {
        "seed": seed,
        "vocab": choose((8000, 16_000, 50_000)),
        "epochs": rng.randrange(3, 7),
        "batch": choose((4, 6, 8)),
        "width": choose((256, 512)),
        "depth": choose((1, 2)),
        "samples": rng.randrange(90, 260),
        "length": choose((32, 48, 64)),
        "test_batch": choose((4, 8, 16)),
        "drop_last": choose(("", ", drop_last=True")),
        "often": choose((5, 10)),
        "seldom": choose((16, 25, 40)),
        "late": choose((1, 2, 3)),
        "moment": choose((20, 37, 60)),
        "many": choose((8, 30, 64)),
        "few": choose((2, 4)),
        "long": choose((40, 100)),
        "big": choose((32, 64)),
    }
    habits = {each.setup.partition(" = ")[0].strip() or place: each for place, each in enumerate(rng.sample(HABITS, 4))}
    habits = list(habits.values())[: rng.randrange(2, 5)]

    def lines(*parts: str) -> str:
        text = "\n".join(textwrap.dedent(part).strip("\n") for part in parts if part)
        for name, value in numbers.items():
            text = text.replace("{" + name + "}", str(value))
        return text

    guards = random.Random(f"guard {seed}")
    guard = f"if {guards.choice(GUARDS)}:\n    {guards.choice(GUARDED)}"
    train = {"lengths": lines(choose(LENGTHS)), "update": lines(choose(UPDATES))}
    train |= {
        "before": lines(*(each.before for each in habits), guard),
        "after": lines(*(each.after for each in habits)),
    }
    names = "".join(f", {name}" for name in ("ema", "best", "best_state", "patience", "worst"))
    parts = {
        "train": filled(TRAIN, train),
        "each_epoch": lines(*(each.each_epoch for each in habits)) or "pass",
        "end": lines(*(each.end for each in habits)) or "print('done')",
    }
    loop = filled(choose(LOOPS), parts).replace("{globals}", names)
    setup = [lines(GUARD_SETUP), *(textwrap.dedent(each.setup).strip("\n") for each in habits)]
    blocks = (
        HEAD,
        textwrap.dedent(choose(DATA)).strip("\n"),
        "net = Net().to(device)",
        textwrap.dedent(choose(OPTIMIZERS)).strip("\n").replace("{{", "{").replace("}}", "}"),
        textwrap.dedent(choose(EVALUATIONS)).strip("\n"),
        *(each for each in setup if each),
        loop,
        "",
    )
    return "\n".join(lines(each) for each in blocks)


def played(seed: int) -> str:
    """Play one program twice; return its row."""
    import tightfit

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"program{seed}.py"
        path.write_text(script(seed))
        found, whole = tightfit.dryrun(path, gpu=GPU), tightfit.dryrun(path, gpu=GPU, until_stable=False)
    figures = [f"{each.peak.allocated_bytes / 2**20:.2f}" for each in (whole, found)]
    if found.outcome != "fits" or whole.outcome != "fits":
        return f"{seed},{figures[0]},{figures[1]},{whole.steps},{found.steps},{len(found.not_played)},{found.outcome}"
    true = whole.peak.allocated_bytes
    is_right = abs(found.peak.allocated_bytes - true) <= CLOSE * true
    is_above = true < found.peak.allocated_bytes <= ABOVE * true
    requested = whole.peak.requested_bytes
    if not is_right and abs(found.peak.requested_bytes - requested) <= CLOSE * requested:
        is_above, is_right = False, True
        figures[1] += " blocks"
    verdict = "right" if is_right else "above" if is_above else "listed" if found.not_played else "WRONG"
    return f"{seed},{figures[0]},{figures[1]},{whole.steps},{found.steps},{len(found.not_played)},{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print the program of --first, and play nothing")
    options = parser.parse_args()
    if options.show:
        sys.stdout.write(script(options.first))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # for what the programs print
    os.dup2(nowhere, 2)
    print("seed,whole_mib,peak_mib,whole_steps,steps,lines_not_played,verdict", file=rows)
    verdicts: Counter[str] = Counter()
    seeds = range(options.first, options.first + options.count)
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(played, seeds):
            verdicts[row.rpartition(",")[2]] += 1
            print(row, file=rows, flush=True)
    print(dict(verdicts), file=rows)


if __name__ == "__main__":
    main()
