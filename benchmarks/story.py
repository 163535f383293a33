"""The picture of the README: nanoGPT's train.py on the card that ran out of memory, in light and in dark.

usage: python benchmarks/story.py NANOGPT [--out FOLDER]

NANOGPT is a checkout of https://github.com/karpathy/nanoGPT whose data/openwebtext_local has a train.bin and a
val.bin; what they hold makes no difference. Compiling needs triton.
"""

import argparse
import os
from pathlib import Path

import tightfit
from tightfit.report.tensor_texts import place_text
from tightfit.report.timeline_picture import timeline_picture

CARD = {"gpu": "RTX 3060 12GB", "memory_bytes": round(11.69 * 2**30), "used_bytes": round(1.97 * 2**30)}
ARGUMENTS = ("--dataset=openwebtext_local", "--batch_size=64", "--gradient_accumulation_steps=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    out = options.out.resolve()
    os.chdir(options.nanogpt)
    found = tightfit.dryrun("train.py", *ARGUMENTS, **CARD, timeline=True)
    if found.failure is None or found.timeline is None:
        raise SystemExit("the run did not fail; is that nanoGPT's train.py?")
    for name, dark in (("story.svg", False), ("story-dark.svg", True)):
        timeline_picture(
            found.timeline,
            out / name,
            card=found.gpu.name,
            outcome=found.outcome,
            place=place_text(found.failure),
            dark=dark,
        )


if __name__ == "__main__":
    main()
