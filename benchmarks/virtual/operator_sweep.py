"""Play torch's own operator samples on the virtual GPU; compare shapes, dtypes and strides with the processor's run.

    python benchmarks/virtual/operator_sweep.py --out operators.csv [--samples 2] [--only linalg]

One row an operator, dtype and pass: its worst outcome over the samples. `equal`: as the processor. `strides`: shapes
and dtypes equal, strides not (a card's kernels may choose others). `differs`: a shape or dtype is another.
`refused`: one sentence of ours. `crashed`: any other error where the processor has none.
"""

import argparse
import contextlib
import csv
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

import tightfit

OUTCOMES = ("equal", "strides", "differs", "refused", "crashed")
DTYPES = (torch.float32, torch.bfloat16)
Layout = tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]


def layouts(out: object) -> list[Layout]:
    found = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor):
            strides = leaf.stride() if leaf.layout == torch.strided else ()
            found.append((tuple(leaf.shape), leaf.dtype, strides))
    return found


def compared(real: list[Layout], virtual: list[Layout]) -> tuple[str, str]:
    if [each[:2] for each in real] != [each[:2] for each in virtual]:
        return "differs", f"{[each[:2] for each in virtual]} for {[each[:2] for each in real]}"
    return ("equal", "") if real == virtual else ("strides", f"{virtual} for {real}")


def gradients(op: Callable[..., Any], sample: Any, where: str) -> list[Layout]:  # Any: torch's own sample inputs
    """Run an operator and its backward pass, and return the gradients' layouts."""

    def leaf(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        moved = value.detach().to(where)
        return moved.requires_grad_() if moved.is_floating_point() else moved

    inputs = tree_map(leaf, (sample.input, sample.args, sample.kwargs))
    out = op(inputs[0], *inputs[1], **inputs[2])
    roots = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and each.requires_grad]
    if not roots:
        return []
    torch.autograd.backward(roots, [torch.ones_like(each) for each in roots])
    return layouts([each.grad for each in tree_leaves(inputs) if isinstance(each, torch.Tensor)])


def forward(op: Callable[..., Any], sample: Any, where: str) -> list[Layout]:
    def moved(value: object) -> object:
        return value.detach().to(where) if isinstance(value, torch.Tensor) else value

    first, args, kwargs = tree_map(moved, (sample.input, sample.args, sample.kwargs))
    return layouts(op(first, *args, **kwargs))


def outcome(run: Callable[..., list[Layout]], op: Callable[..., Any], sample: Any) -> tuple[str, str]:
    """Return the outcome of one sample, and what was different."""
    try:
        real = run(op, sample, "cpu")
    except Exception:  # the processor cannot: no answer to compare with
        return "", ""
    try:
        return compared(real, run(op, sample, "cuda"))
    except NotImplementedError as error:
        text = str(error)
        return ("refused" if "virtual GPU" in text or "register_fake" in text else "crashed"), text
    except Exception as error:
        if "to be on cpu" in str(error):  # an argument that a card takes from the host, and the sweep has moved
            return "", ""
        return "crashed", f"{type(error).__name__}: {error}"


def rows(samples: int, only: str = "") -> Iterator[dict[str, str]]:
    for info in op_db:
        if only not in info.name:
            continue
        for dtype in DTYPES:
            if dtype not in info.supported_dtypes("cpu"):
                continue
            with contextlib.suppress(Exception):  # some samples cannot be made in every build
                chosen = [sample for sample, _ in zip(info.sample_inputs("cpu", dtype), range(samples), strict=False)]
                runs = {"forward": forward}
                if info.supports_autograd and dtype in info.supported_backward_dtypes("cpu"):
                    runs["backward"] = gradients
                for name, run in runs.items():
                    found = [outcome(run, info.op, sample) for sample in chosen]
                    worst = max(
                        (each for each in found if each[0]), key=lambda each: OUTCOMES.index(each[0]), default=None
                    )
                    if worst is not None:
                        text = " ".join(worst[1].split())[:200]
                        yield {
                            "operator": info.formatted_name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "pass": name,
                            "outcome": worst[0],
                            "note": text,
                        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file with a row an operator, dtype and pass")
    parser.add_argument("--samples", type=int, default=2, help="samples of each operator (default 2)")
    parser.add_argument("--only", default="", help="play operators with this in their name")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[tuple[str, str, str]] = Counter()
    with tightfit.VirtualGPU("RTX 3090"), options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["operator", "dtype", "pass", "outcome", "note"])
        writer.writeheader()
        for row in rows(options.samples, options.only):
            writer.writerow(row)
            file.flush()
            counts[row["dtype"], row["pass"], row["outcome"]] += 1
    for key, count in sorted(counts.items()):
        print(*key, count)
    sys.exit(1 if any(key[2] == "crashed" for key in counts) else 0)


if __name__ == "__main__":
    main()
