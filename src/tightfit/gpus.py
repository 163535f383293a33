"""What a card is: facts of `gpus.csv`, each with its source there. An unknown card is unknown, never another one."""

import csv
import functools
import re
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class GPU:
    name: str
    bf16_tflops: float | None
    """Peak of dense bfloat16 matrix products with float32 accumulation, 10^12 FLOP/s; None if it has no such units."""
    fp16_tflops: float | None
    fp32_tflops: float | None

    def peak_flops(self, dtype: str) -> float | None:
        """FLOP/s of matrix products in `dtype` (float32, bfloat16, float16), or None if not known."""
        by_dtype = {"bfloat16": self.bf16_tflops, "float16": self.fp16_tflops, "float32": self.fp32_tflops}
        tflops = by_dtype[dtype]
        return None if tflops is None else tflops * 1e12


def find_gpu(name: str) -> GPU | None:
    """The card that a driver calls `name`, like "NVIDIA GeForce RTX 3090", or None if it is not in the table.

    >>> find_gpu("NVIDIA GeForce RTX 3090").name
    'GeForce RTX 3090'
    >>> find_gpu("NVIDIA GeForce RTX 3060") is None  # 8 GB or 12 GB: the name does not say
    True
    """
    return _table().get(_key(name))


def _key(name: str) -> str:
    return re.sub(r"^nvidia |^tesla | \(.*\)$", "", name.strip().lower()).strip()


@functools.cache
def _table() -> dict[str, GPU]:
    def number(text: str) -> float | None:
        return float(text) if text else None

    with files("tightfit").joinpath("gpus.csv").open(encoding="utf-8") as file:
        return {
            _key(row["name"]): GPU(
                name=row["name"],
                bf16_tflops=number(row["bf16_dense_tflops"]),
                fp16_tflops=number(row["fp16_dense_tflops"]),
                fp32_tflops=number(row["fp32_tflops"]),
            )
            for row in csv.DictReader(file)
        }
