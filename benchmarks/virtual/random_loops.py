"""Play training loops that a random number generator writes, and compare their peaks with what they truly allocate.

    python benchmarks/virtual/random_loops.py --first 0 --count 100 [--jobs 2]

Each loop takes some hundred steps and allocates tensors of different sizes behind conditions in many forms: counters,
inner loops, functions, objects, `match`, blocks behind others, blocks that free what is held. The truth is the most
that the tensors of the same script take together where torch is replaced by something that only counts them. This
shows lines that a dry run passes over.
`--far` writes more of what a loop's source does not lead to: decorators, closures, properties, modules, growing lists.
One row a script: `right`, `listed` (another peak, and lines named that were not played) or `WRONG`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import types
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GPU = "A100 SXM 80GB"
MIB = 1 << 20
APART = 64
"""MiB between the sizes of two tensors, and less than half of it is everything else."""
PERIODS = (7, 50, 100, 250, 333, 500)
TRAINING = ("model(x).sum().backward()", "optimizer.step()", "optimizer.zero_grad()")
HEAD = """\
import contextlib, functools, itertools, torch
options = {{"every": {every}}}
done = False
{model}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.zeros(4, 64, device="cuda")
"""


LINEAR = "model = torch.nn.Linear(64, 64).cuda()"
MODULE = """\
class Net(torch.nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 64)
    def forward(self, x):
        self.calls += 1
        if {test}:
            {tensor}
        return self.inner(x)
model = Net().cuda()"""


REACHED = (
    ("{name} = lambda s: {tensor} if {if_s} else None", "{name}({counter})"),
    (
        """
        def of_{name}(k, s):
            if {if_s}:
                {tensor}
        {name} = functools.partial(of_{name}, 1)
        """,
        "{name}({counter})",
    ),
    (
        """
        def on_some(function):
            @functools.wraps(function)
            def inner(s):
                if {if_s}:
                    return function(s)
            return inner
        @on_some
        def {name}(s):
            {tensor}
        """,
        "{name}({counter})",
    ),
    (
        """
        def make_{name}():
            n = 0
            def inner():
                nonlocal n
                n += 1
                if {if_n}:
                    {tensor}
            return inner
        {name} = make_{name}()
        """,
        "{name}()",
    ),
    (
        """
        class Of{name}:
            n = 0
            def step(self):
                self.n += 1
                if {if_field}:
                    {tensor}
        class To{name}(Of{name}):
            def step(self):
                super().step()
        {name} = To{name}()
        """,
        "{name}.step()",
    ),
    (
        """
        class Of{name}:
            n = 0
            @property
            def more(self):
                self.n += 1
                if {if_field}:
                    {tensor}
        {name} = Of{name}()
        """,
        "{name}.more",
    ),
    (
        """
        def of_{name}(s):
            if {if_s}:
                {tensor}
        {name} = dict(hook=of_{name})
        """,
        """
        for key in {name}:
            {name}[key]({counter})
        """,
    ),
    (
        """
        def make_{name}():
            n = 0
            def inner():
                nonlocal n
                n += 1
                held = {tensor}
                if not ({if_n}):
                    held = None
                {other}
            return inner
        {name} = make_{name}()
        """,
        "{name}()",
    ),
    (
        """
        class Of{name}:
            n = 0
            def step(self):
                self.n += 1
                held = {tensor}
                if not ({if_field}):
                    del held
                {other}
        class To{name}(Of{name}):
            def step(self):
                super().step()
        {name} = To{name}()
        """,
        "{name}.step()",
    ),
    (
        "{name} = []",
        """
        {name}.append(1)
        if {if_length}:
            {tensor}
        """,
    ),
    (
        "{name} = dict([({moment}, {size})])",
        """
        if {counter} in {name}:
            size = {name}[{counter}]
        else:
            size = 1
        {tensor_of_size}
        """,
    ),
    (
        """
        def of_{name}():
            yield from itertools.count()
        {name} = of_{name}()
        """,
        """
        if {if_next}:
            {tensor}
        """,
    ),
)
"""What a loop's source does not lead to, and the statements of the loop that lead there."""


class Writer:
    """Writes one script."""

    def __init__(self, seed: int, *, far: bool) -> None:
        self._random, self._far = random.Random(seed), far
        self._sizes = iter(range(APART, 400 * APART, APART))
        self._names = (f"part{number}" for number in range(1000))
        self._defined: list[str] = []

    def script(self) -> str:
        steps = self._random.choice((300, 700, 1500))
        forms = (self._for, self._while, self._endless, self._epochs, self._until, self._function, self._generator)
        forms = (*forms, self._trainer)
        loop = self._random.choice(forms)(steps)
        model = LINEAR
        if self._far and self._random.random() < 0.3:
            model = MODULE.format(test=self._condition("self.calls", steps), tensor=self._tensor())
        head = HEAD.format(every=self._random.choice((40, 90, 400)), model=model)
        return "\n".join([head, *self._defined, *loop, ""])

    def _tensor(self, size: object = None) -> str:
        return f"torch.zeros({size or next(self._sizes)} << 20, dtype=torch.uint8, device='cuda')"

    def _condition(self, counter: str, most: int) -> str:
        period, moment = self._random.choice(PERIODS), self._random.randrange(most // 3, most - 1)
        return self._random.choice(
            (
                f"{counter} % {period} == {self._random.randrange(period)}",
                f"{counter} == {moment}",
                f"({counter} + 1) % {period} == 0",
                f"not {counter} % {period}",
                f"{moment} < {counter} < {moment + 5}",
                f"{counter} in (5, {moment})",
                f"{counter} > {moment}",
                f"{counter} % {period} == 0 and {counter} > {most // 2}",
                f"{counter} % {period} == 3 or {counter} == {moment}",
                f"({counter} & 127) == 127",
                f"divmod({counter}, {period})[1] == 1",
                f"options['every'] and {counter} % options['every'] == 0",
                f"{counter} >= {moment} and not done",
                f"(left := {most} - {counter}) == {self._random.randrange(1, 30)}",
            )
        )

    def _called(self, counter: str, most: int) -> str:
        """Define a function, or an object that can be called; return the call."""
        name, test = next(self._names), self._condition
        forms = (
            [f"def {name}(s):", f"    if {test('s', most)}:", f"        {self._tensor()}"],
            [f"def {name}(s):", f"    if not ({test('s', most)}):", "        return", f"    {self._tensor()}"],
            [
                f"def {name}(s):",
                f"    size = {next(self._sizes)} if {test('s', most)} else 1",
                f"    return {self._tensor('size')}",
            ],
            [
                f"class Of{name}:",
                "    calls = 0",
                "    def __call__(self, s):",
                "        self.calls += 1",
                f"        if {test('self.calls', most)}:",
                f"            {self._tensor()}",
                f"{name} = Of{name}()",
            ],
            [
                f"lengths_{name} = [(0, 1), ({self._random.randrange(most // 3, most - 1)}, {next(self._sizes)})]",
                f"def length_{name}(s):",
                f"    for start, length in reversed(lengths_{name}):",
                "        if s >= start:",
                "            return length",
                f"def {name}(s):",
                f"    {self._tensor(f'length_{name}(s)')}",
            ],
            [
                f"class Of{name}:",
                "    size = 1",
                "    def more(self, size):",
                "        self.size = size",
                f"of_{name} = Of{name}()",
                f"def {name}(s):",
                f"    if {test('s', most)}:",
                f"        of_{name}.size = {next(self._sizes)}",
                "    hidden(s)",
                f"hidden = functools.partial(lambda held, s: {self._tensor('held.size')}, of_{name})",
            ],
            [
                f"def {name}(s):",
                "    for j in range(3):",
                f"        if j == 1 and {test('s', most)}:",
                f"            {self._tensor()}",
            ],
        )
        self._defined += self._random.choice(forms)
        return f"{name}({counter})"

    def _reached(self, counter: str, most: int) -> list[str]:
        """Define what a loop's source does not lead to; return the statements that lead there."""
        name, sizes = next(self._names), self._sizes
        given = {"name": name, "counter": counter, "tensor": self._tensor(), "tensor_of_size": self._tensor("size")}
        given["other"] = self._tensor()
        given |= {f"if_{each}": self._condition(each, most) for each in ("s", "n")}
        given["if_field"] = self._condition("self.n", most)
        given |= {"if_length": self._condition(f"len({name})", most), "if_next": self._condition(f"next({name})", most)}
        given |= {"moment": str(self._random.randrange(most)), "size": str(next(sizes))}
        makes, leads = (textwrap.dedent(each) for each in self._random.choice(REACHED))
        self._defined += makes.format_map(given).strip().splitlines()
        return leads.format_map(given).strip().splitlines()

    def _counted(self, most: int) -> list[str]:
        name = next(self._names)
        self._defined.append(f"options[{name!r}] = 0")
        counter = f"options[{name!r}]"
        return [f"{counter} += 1", f"if {self._condition(counter, most)}:", f"    {self._tensor()}"]

    def _statements(self, counter: str, most: int) -> Iterator[str]:
        """Yield what a loop does beside its training, a few statements."""
        test = self._condition
        for _ in range(self._random.randrange(1, 4)):
            branch = [f"if {test(counter, most)}:", f"    {self._tensor()}"]
            inner = [f"    {line}" for line in branch]
            if self._far and self._random.random() < 0.7:
                yield from self._reached(counter, most)
                continue
            yield from self._random.choice(
                (
                    branch,
                    [*branch, f"elif {test(counter, most)}:", f"    {self._tensor()}"],
                    [self._called(counter, most)],
                    ["try:", "    pass", "finally:", *inner],
                    ["for _ in range(2):", "    pass", "else:", *inner],
                    ["with contextlib.nullcontext():", *inner],
                    [f"size = {next(self._sizes)} if {test(counter, most)} else 1", self._tensor("size")],
                    ["for j in range(4):", f"    if j == 2 and {test(counter, most)}:", f"        {self._tensor()}"],
                    [f"match {counter} % 90:", f"    case {self._random.randrange(90)}:", f"        {self._tensor()}"],
                    self._counted(most),
                    [f"({test(counter, most)}) and {self._tensor()}"],
                    self._freed(counter, most),
                    self._freed(counter, most),
                )
            )

    def _freed(self, counter: str, most: int) -> list[str]:
        """Return statements that free what they hold, as long as a condition holds, and then need more."""
        moment, period = self._random.randrange(most // 3, most - 1), self._random.choice(PERIODS)
        given, is_called = counter, self._random.random() < 0.5
        counter = "s" if is_called else counter
        test = self._random.choice(
            (
                f"{counter} < {moment}",
                f"not {counter} > {moment}",
                f"{counter} != {moment}",
                f"{counter} % {period} != {self._random.randrange(period)}",
                f"{counter} <= {moment} or done",
            )
        )
        name = next(self._names)
        frees = self._random.choice(("held = None", "del held", "held = held[:1].clone()"))
        lines = [f"held = {self._tensor()}", f"if {test}:", f"    {frees}", self._tensor(), "held = None"]
        if not is_called:
            return lines
        self._defined += [f"def {name}(s):", *(f"    {line}" for line in lines)]
        return [f"{name}({given})"]

    def _body(self, counter: str, most: int, indent: int = 1) -> list[str]:
        return [" " * 4 * indent + line for line in (*TRAINING, *self._statements(counter, most))]

    def _for(self, steps: int) -> list[str]:
        return [f"for i in range({steps}):", *self._body("i", steps)]

    def _while(self, steps: int) -> list[str]:
        return ["i = 0", f"while i < {steps}:", *self._body("i", steps), "    i += 1"]

    def _endless(self, steps: int) -> list[str]:
        return ["for i in itertools.count():", *self._body("i", steps), f"    if i == {steps}:", "        break"]

    def _epochs(self, steps: int) -> list[str]:
        each = steps // 3
        head = [f"for epoch in range({self._random.randrange(2, 6)}):", f"    for batch in range({each}):"]
        count = f"        i = epoch * {each} + batch"
        after = [f"    {line}" for line in self._statements("epoch", 6)]
        return [*head, count, *self._body("i", each, 2), *after]

    def _until(self, steps: int) -> list[str]:
        """Write epochs that end with a number of steps."""
        ends = [f"if i >= {steps}:", f"    {self._tensor()}", "    break"]
        inner = ["i += 1", f"if i >= {steps}:", "    break"]
        return [
            *("i = 0", "for epoch in range(1000):", f"    for batch in range({steps // 3 + 7}):"),
            *self._body("i", steps, 2),
            *(f"        {line}" for line in inner),
            *(f"    {line}" for line in (*self._statements("i", steps), *ends)),
        ]

    def _function(self, steps: int) -> list[str]:
        body = self._body("i", steps, 2)
        return ["def train():", f"    for i, _ in enumerate(range({steps})):", *body, "    return i", "train()"]

    def _generator(self, steps: int) -> list[str]:
        head = ["def batches():", f"    for i in range({steps}):", "        yield i"]
        return [*head, "for i in batches():", *self._body("i", steps)]

    def _trainer(self, steps: int) -> list[str]:
        head = ["class Trainer:", "    step = 0", "    def one(self):", "        self.step += 1"]
        run = ["    def run(self):", f"        while self.step < {steps}:", "            self.one()", "Trainer().run()"]
        return [*head, *self._body("self.step", steps, 2), *run]


class _Anything:
    def __getattr__(self, name: str) -> "_Anything":
        return self

    def __call__(self, *args: object, **options: object) -> "_Anything":
        return self


class _Module:
    """Stands for a module: it calls its own `forward`, if it has any."""

    def __init__(self, *sizes: int) -> None:
        pass

    def __call__(self, x: object) -> object:
        return self.forward(x)

    def forward(self, x: object) -> object:
        return _Anything()

    def cuda(self) -> "_Module":
        return self

    def parameters(self) -> list[object]:
        return []


def largest_of(script: str) -> int:
    """Return the most MiB that a script's tensors take together; it runs with something in place of torch."""
    largest, taken = [0], [0]

    class Held:
        """A tensor that is not there."""

        def __init__(self, size: int, *others: object, **options: object) -> None:
            self.mib = size // MIB
            taken[0] += self.mib
            largest[0] = max(largest[0], taken[0])

        def __del__(self) -> None:
            taken[0] -= self.mib

        def __getitem__(self, key: object) -> "Held":
            return Held(0)

        def clone(self) -> "Held":
            return self

    nn = types.SimpleNamespace(Module=_Module, Linear=_Module)
    torch = types.ModuleType("torch")
    for name, value in {"zeros": Held, "uint8": None, "nn": nn, "optim": _Anything()}.items():
        setattr(torch, name, value)
    sys.modules["torch"] = torch
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    return largest[0]


def played(seed: int, script: str, truth: int) -> str:
    """Play one script; return its row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"loop{seed}.py"
        path.write_text(script)
        words = [sys.executable, "-m", "tightfit", "dryrun", "--json", "--gpu", GPU, str(path)]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        return f"{seed},{truth},,,WRONG"
    found = json.loads(done.stdout)
    peak = found["peak"]["allocated_bytes"] // MIB
    verdict = "right" if 0 <= peak - truth < APART // 2 else "listed" if found["not_played"] else "WRONG"
    return f"{seed},{truth},{peak},{found['steps']},{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--far", action="store_true")
    options = parser.parse_args()
    print("seed,largest_mib,peak_mib,steps,verdict")
    verdicts: Counter[str] = Counter()
    seeds = range(options.first, options.first + options.count)
    scripts = [Writer(seed, far=options.far).script() for seed in seeds]
    truths = [largest_of(script) for script in scripts]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(played, seeds, scripts, truths):
            verdicts[row.rpartition(",")[2]] += 1
            print(row, flush=True)
    print(dict(verdicts))


if __name__ == "__main__":
    main()
