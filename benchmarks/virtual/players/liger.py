"""Rows of Liger-Kernel's benchmark data, played by Liger's own scripts: one process for each script and card.

usage: tightfit dryrun --gpu NAME benchmarks/virtual/players/liger.py FOLDER SCRIPT WANTED.json

FOLDER is a checkout of Liger-Kernel at the commit that added the rows; SCRIPT is below its benchmark/scripts. WANTED is
a list of [kernel, provider, mode, x, configuration as JSON]. The script runs as `__main__`. Its `run_benchmarks` calls
the script's own memory function once for each wanted row, and `_test_memory` takes the median of the same ten peaks
without PyTorch's `quantile`. The wanted rows replace the sweep that newer scripts size by a probe of the card. Of the
scripts in COMPILED all is played in its own order, speed too. Nothing else of Liger is replaced. It prints one line
`ROW number bytes` a row.
"""

import gc
import importlib.util
import itertools
import json
import runpy
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

DTYPES = {str(each): each for each in (torch.float32, torch.bfloat16, torch.float16)}

PROBED_BYTES = 2**30
"""Answer of the probe; it sizes only the sweep that is not played."""

PRODUCTS_BEFORE = {
    "benchmark_fused_moe.py",
    "benchmark_fused_linear_jsd.py",
    "benchmark_grpo_loss.py",
    "benchmark_fused_linear_cross_entropy.py",
}
"""Scripts that multiply matrices, backward too, before they measure memory: in a probe, or for speed with PyTorch."""

COMPILED = {"benchmark_kto_loss.py", "benchmark_simpo_loss.py", "benchmark_orpo_loss.py", "benchmark_cpo_loss.py"}
"""Scripts whose benchmarks leave compiled functions, and with torch 2.5 these functions' tensors, to later ones."""


def multiply(script: str) -> None:
    """Leave what such products leave in the process: the cuBLAS workspaces of forward and backward."""
    if script in PRODUCTS_BEFORE:
        x = torch.ones(16, 16, device="cuda", requires_grad=True)
        (x @ x).sum().backward()


def probe(script: str) -> int:
    multiply(script)
    return PROBED_BYTES


def median_peak(func: Callable[[], object], _iter: int = 10, **_: object) -> tuple[float, float, float]:
    peaks = []
    for _round in range(_iter):
        torch.cuda.memory.reset_peak_memory_stats()
        func()
        peaks.append(torch.cuda.max_memory_allocated())
    return (statistics.median_low(peaks),) * 3


def number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def configuration(text: str) -> dict[str, object]:
    values = json.loads(text)
    return {key: DTYPES.get(value, value) if isinstance(value, str) else value for key, value in values.items()}


def player(wanted: list[list[str]], script: str, run_input: Callable[..., object]) -> Callable[..., None]:
    done = set()

    def run_benchmarks(
        bench_test_fn: Callable[[object], SimpleNamespace], kernel_name: str, metric_name: str, **_: object
    ) -> None:
        if metric_name != "memory":
            multiply(script)
            return
        for place, (kernel, provider, mode, x, config) in enumerate(wanted):
            if kernel != kernel_name or place in done:
                continue
            done.add(place)
            before = torch.cuda.memory_allocated()
            try:
                found = bench_test_fn(
                    run_input(
                        x=number(x),
                        kernel_provider=provider,
                        kernel_operation_mode=mode,
                        extra_benchmark_config=configuration(config),
                    )
                )
                print("ROW", place, int(found.y_50), before, flush=True)
            except Exception as error:  # the script's own, whatever it is: the row says which
                print("ERROR", place, f"{type(error).__name__}: {error}".replace("\n", " ")[:300], flush=True)
                traceback.print_exc()
                del error
            gc.collect()
            torch.cuda.empty_cache()

    return run_benchmarks


def whole_player(wanted: list[list[str]], run_input: Callable[..., object]) -> Callable[..., None]:
    """Play all providers and sizes of a script in its order, with the configuration of the wanted rows."""
    config = configuration(wanted[0][4])
    places = {(provider, mode, number(x)): place for place, (_, provider, mode, x, _) in enumerate(wanted)}

    def run_benchmarks(
        bench_test_fn: Callable[[object], SimpleNamespace],
        metric_name: str,
        x_values: list[int],
        kernel_providers: list[str],
        kernel_operation_modes: list[str],
        **_: object,
    ) -> None:
        for mode, provider, x in itertools.product(kernel_operation_modes, kernel_providers, x_values):
            before = torch.cuda.memory_allocated()
            values = {"x": x, "kernel_provider": provider, "kernel_operation_mode": mode}
            try:
                found = bench_test_fn(run_input(**values, extra_benchmark_config=config))
            except torch.OutOfMemoryError:  # the plain version's, at a size of the Liger version
                continue
            if metric_name == "memory" and (provider, mode, x) in places:
                print("ROW", places[provider, mode, x], int(found.y_50), before, flush=True)

    return run_benchmarks


def call_thrice(func: Callable[[], object], **_: object) -> tuple[float, float, float]:
    """Stand in for Triton's measurement of speed."""
    for _round in range(3):
        func()
    return 1.0, 1.0, 1.0


def main() -> None:
    folder, script, wanted = Path(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
    sys.path[:0] = [str(folder / "src"), str(folder / "benchmark" / "scripts")]
    import utils

    if script in COMPILED:
        importlib.import_module("triton.testing").do_bench = call_thrice
        utils.run_benchmarks = whole_player(wanted, utils.SingleBenchmarkRunInput)
    else:
        utils.run_benchmarks = player(wanted, script, utils.SingleBenchmarkRunInput)
    utils._test_memory = median_peak
    if importlib.util.find_spec("benchmark_model_configs"):
        importlib.import_module("benchmark_model_configs").estimate_kernel_peak_memory = lambda **_: probe(script)
    sys.argv = [script, *sys.argv[4:]]
    runpy.run_path(str(folder / "benchmark" / "scripts" / script), run_name="__main__")


main()
