"""Every figure of the README and the documentation, from the rows that stand behind it.

usage: python -m benchmarks.figures README.md

It writes the README's table anew; pages of the documentation are filled in when the site is built (docs/hooks.py).
"""

import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
Row = dict[str, str]
Row3 = tuple[str, str, str]

DISTURBED = {("124m-4x256", "1", "compare-medium-4x256.csv")}
"""Size, repeat and file of pairs that are left out: another program slowed nanoGPT in it."""
SIZES = {
    "small": "4 layers x 128, block 64, batch 12",
    "medium": "6 x 384, block 256, batch 16",
    "124m-4x256": "GPT-2 124M, 4 x 256",
    "124m-2x1024": "GPT-2 124M, 2 x 1024",
}
TOOLS = {
    "transformers-epoch": "transformers {transformers_version}, `auto_find_batch_size`",
    "accelerate-docs": "accelerate {accelerate_version}, `find_executable_batch_size`, model inside",
    "accelerate-example": "accelerate {accelerate_version}, the same, model outside",
    "lightning": "Lightning {lightning_version}, batch size finder before `fit`",
    "tightfit": "`tightfit train`",
}
ATTACKS = {
    "kills": "SIGKILL at a random moment of training, then resumed",
    "signals": "each signal that can be caught, at a random moment",
    "preparing": "SIGKILL of `prepare`, then run again",
    "errors": "memory refused at a random operator, in one process or two",
    "limits": "a limit of the process's memory",
    "disk_errors": "an errno (ten kinds) from `fsync` or `replace` on",
    "small_disks": "a disk of 100 to 1600 KiB",
    "bits": "a flipped bit of a checkpoint's zip directory",
    "cuts": "a checkpoint cut at a tenth byte",
    "mistakes": "a command with mistaken options, values or files",
    "hostile_files": "a file that would execute something, or unpack to too much",
}
ATTACKS_ON_RANKS = {
    ("kills", "kills"): "SIGKILL of a whole run, resumed by 1, 2, 3 or 4 processes in turn, with either sharding",
    ("same", "kills"): "the same, always with two processes: the end has the same bits",
    ("errors", "errors"): "memory refused at a random operator of one of two processes",
    ("losses", "SIGKILL"): "SIGKILL of one of two processes",
    ("losses", "SIGSTOP"): "SIGSTOP of one of two processes",
    ("agents", "agents that came back"): "one of two torchrun agents lost, and started anew",
}
NEAR = 0.01
"""Share that counts as close."""
RANDOM_STATE_BYTES = 5056
"""Random state of the host that a recomputed block with dropout keeps, which no operator takes."""


def rows(path: str) -> list[Row]:
    with open(ROOT / path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    r"""Return a table in Markdown.

    >>> print(table(["a", "b"], [[1, "x"]]))
    | a | b |
    |---|---|
    | 1 | x |
    """

    def line(cells: Sequence[object]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, body)])


def percent(value: float, *, sign: bool = False) -> str:
    """Return a share in per cent, with two digits that count.

    >>> percent(0.000931), percent(-0.104783, sign=True)
    ('0.09%', '-10.5%')
    """
    digits = 1 if abs(value) >= 0.01 else 2
    return f"{100 * value:{'+' if sign else ''}.{digits}f}%"


class Errors:
    """Relative errors of predictions: how many, the median of their sizes, the worst and the next."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = sorted(values, key=abs)
        self.count = len(self.values)
        self.median = percent(statistics.median(map(abs, self.values)))
        self.worst = percent(self.values[-1], sign=True)
        self.next = percent(abs(self.values[-2])) if self.count > 1 else ""


def card() -> Errors:
    """Reserved memory on a real RTX 3060."""
    return Errors(float(row["error"]) for row in rows("benchmarks/virtual/results/rtx3060.csv"))


def xmem() -> Errors:
    """xMem's own predictions of the same rows."""
    wanted = {_key(row) for row in rows("benchmarks/virtual/results/rtx3060.csv")}
    found: dict[Row3, float] = {}
    for row in rows("tests/rtx3060_measured.csv"):
        if _key(row) in wanted and row["real_oom"] == "False":
            found.setdefault(_key(row), int(row["xmem_bytes"]) / int(row["ground_bytes"]) - 1)
    return Errors(found.values())


def _key(row: Row) -> Row3:
    """Model, optimizer and batch, as both files have them."""
    model = "cerebras" if "erebras" in row["model"] else row["model"].rpartition("/")[2]
    return model, row["optimizer"], row["batch_size"]


def public_rows() -> list[Row]:
    """Public measurements of real cards that were played, without those set aside for the reason in their note."""
    found = rows("benchmarks/virtual/results/public.csv")
    return [row for row in found if row["error"] and not row["set_aside"]]


def public() -> dict[str, object]:
    """Predicted memory against public measurements of real cards: rows, errors, and what was not played."""
    found = rows("benchmarks/virtual/results/public.csv")
    played = public_rows()
    errors = Errors(float(row["error"]) for row in played)
    return {
        "rows": len(found),
        "count": errors.count,
        "median": errors.median,
        "worst": errors.worst,
        "exact": sum(row["measured_bytes"] == row["predicted_bytes"] for row in played),
        "near": sum(abs(float(row["error"])) <= NEAR for row in played),
        "set_aside": sum(bool(row["set_aside"]) for row in found),
        "not_played": sum(not row["error"] and not row["set_aside"] for row in found),
    }


def public_sources() -> str:
    """Table of public measurements by their source."""
    body = []
    played = public_rows()
    for source in dict.fromkeys(row["source"].partition("@")[0].partition(" ")[0] for row in played):
        own = [row for row in played if row["source"].startswith(source)]
        errors = Errors(float(row["error"]) for row in own)
        near = sum(abs(float(row["error"])) <= NEAR for row in own)
        cards = ", ".join(dict.fromkeys(row["card"].removeprefix("NVIDIA ") for row in own))
        body.append([source, cards, errors.count, near, errors.median, errors.worst])
    return table(["measured by", "cards", "rows", "within 1%", "median error", "worst miss"], body)


def public_misses() -> str:
    """Table of public measurements that were missed by more than 1%."""
    return table(
        ["script", "arguments", "card", "measured", "predicted", "error", "note"],
        [
            [
                row["script"],
                f"`{row['args']}`",
                row["card"],
                f"{int(row['measured_bytes']):,}",
                f"{int(row['predicted_bytes']):,}",
                f"{float(row['error']):+.2%}",
                row["note"],
            ]
            for row in public_rows()
            if abs(float(row["error"])) > NEAR
        ],
    )


def step_time(is_set: bool) -> Errors:
    """Time of a step, of runs that a constant of the model was set on, or of the others."""
    return Errors(
        float(row["modelled_ms"]) / float(row["published_ms"]) - 1
        for row in rows("benchmarks/plan/results/speed.csv")
        if row["set_on_it"] == ("yes" if is_set else "no")
    )


def process_peak() -> Errors:
    """Peak of a training process under limits of the kernel."""
    return Errors(
        int(row["predicted_mib"]) / int(row["measured_mib"]) - 1
        for row in rows("benchmarks/fit_host/results/limits.csv")
        if row["outcome"] == "trained"
    )


def host_step() -> dict[str, object]:
    """Bytes of a step on the host: rows, the median, the worst, how many it has, and the most of the others."""
    found = [
        int(row["predicted_bytes"]) - int(row["measured_bytes"])
        for row in rows("benchmarks/virtual/results/oracle.csv")
    ]
    states = [each for each in found if each <= -2 * RANDOM_STATE_BYTES]
    return {
        "count": len(found),
        "median": f"{statistics.median(map(abs, found)):.0f} bytes",
        "worst": f"{min(found) / 1024:+.0f} KiB",
        "states": len(states),
        "others": f"{max(abs(each) for each in found if each not in states):,} bytes",
    }


def processor() -> str:
    """Table of whole programs in turn on a processor."""
    body = []
    for size, name in SIZES.items():
        pairs = _pairs(size, lambda file: file != "compare-zen4.csv")
        slow = [float(one["step_ms"]) for one, _ in pairs]
        fast = [float(other["step_ms"]) for _, other in pairs]
        memory = [int(other["peak_bytes"]) / int(one["peak_bytes"]) for one, other in pairs]
        body.append(
            [
                name,
                len(pairs),
                _span(slow),
                _span(fast),
                f"{statistics.median(slow) / statistics.median(fast):.1f}x",
                f"{statistics.median(memory):.2f}x",
            ]
        )
    return table(["model, batch", "pairs", "nanoGPT ms a step", "tightfit ms a step", "speed", "peak memory"], body)


def older_processor() -> dict[str, str]:
    """How many times as fast as nanoGPT on an EPYC of the Zen 4 generation, by size: the least and the most."""
    found = {}
    for size in SIZES:
        pairs = _pairs(size, lambda file: file == "compare-zen4.csv")
        ratios = sorted(float(one["step_ms"]) / float(other["step_ms"]) for one, other in pairs)
        if ratios:
            ends = dict.fromkeys((f"{ratios[0]:.1f}x", f"{ratios[-1]:.1f}x"))
            found[size.replace("-", "_")] = " to ".join(ends) + (f" ({len(ratios)} pairs)" if len(ratios) > 1 else "")
    return found


def disturbed() -> str:
    """Milliseconds of nanoGPT's steps in the pair that is left out."""
    ((size, repeat, file),) = DISTURBED
    found = [row for row in rows(f"benchmarks/cpu/results/{file}") if (row["size"], row["repeat"]) == (size, repeat)]
    return _span([float(row["step_ms"]) for row in found if row["program"] == "nanogpt"])


def _pairs(size: str, chosen: Callable[[str], bool]) -> list[tuple[Row, Row]]:
    found = []
    for path in sorted((BENCHMARKS / "cpu" / "results").glob("compare-*.csv")):
        if not chosen(path.name):
            continue
        lines = [row for row in rows(str(path.relative_to(ROOT))) if row["size"] == size]
        for one, other in zip(lines[::2], lines[1::2], strict=True):
            if (size, one["repeat"], path.name) not in DISTURBED:
                found.append((one, other))
    return found


def _span(values: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{each:.1f}" if each < 100 else f"{each:.0f}" for each in (min(values), max(values)))
    return " to ".join(ends)


def recovery(failure: str) -> str:
    """Table of what an error leaves of a run, by tool."""
    body = []
    found = {row["tool"]: row for row in rows("benchmarks/recovery/results/compare.csv") if row["failure"] == failure}
    for tool, name in TOOLS.items():
        row = found[tool]
        survived = row["survived"] == "True"
        body.append([name.format(**row), *(_outcome(row) if survived else ["the run ended", "", "", ""])])
    return table(
        ["tool", "step counter", "trained on twice", "effective batch", "final parameters, off an undisturbed run"],
        body,
    )


def _outcome(row: Row) -> list[str]:
    counter = "restarted" if row["counter_restarted"] == "True" else "went on"
    lost = f", {row['steps_lost']} steps lost" if int(row["steps_lost"]) else ""
    twice = f"{row['trained_twice']} of {row['sequences']} sequences" if int(row["trained_twice"]) else "none"
    before, after = row["effective_batch_before"], row["effective_batch_after"]
    difference = float(row["max_abs_difference"])
    return [
        counter + lost,
        twice,
        before if before == after else f"{before} → {after}",
        f"{difference:.1e}" if difference else "none, bit for bit",
    ]


def speeds() -> str:
    """Table of published times of a step against the model's."""
    keys = ["gpu", "script", "published_ms", "modelled_ms", "difference", "set_on_it"]
    return table(
        ["card", "script", "published ms", "modelled ms", "difference", "a constant was set on it"],
        [
            [f"`{row[key]}`" if key == "script" else row[key] for key in keys]
            for row in rows("benchmarks/plan/results/speed.csv")
        ],
    )


def limits() -> str:
    """Table of trainings under limits of the kernel."""
    found = rows("benchmarks/fit_host/results/limits.csv")
    nanogpt = {row["limit_gib"]: row["outcome"] for row in found if row["program"] == "nanoGPT"}
    return table(
        ["limit", "micro-batch", "predicted", "measured", "difference", "nanoGPT's train.py"],
        [
            [
                f"{float(row['limit_gib']):g} GiB",
                row["micro_batch"],
                f"{row['predicted_mib']} MiB",
                f"{row['measured_mib']} MiB",
                row["difference"],
                nanogpt[row["limit_gib"]],
            ]
            for row in found
            if row["program"] == "tightfit"
        ],
    )


def card_rows() -> str:
    """Table of all rows of the RTX 3060."""
    gib = 2**30
    return table(
        ["model", "optimizer", "batch", "measured GiB", "predicted GiB", "error"],
        [
            [
                row["model"],
                row["optimizer"],
                row["batch_size"],
                f"{int(row['measured_bytes']) / gib:.2f}",
                f"{int(row['predicted_bytes']) / gib:.2f}",
                f"{float(row['error']):+.2%}",
            ]
            for row in rows("benchmarks/virtual/results/rtx3060.csv")
        ],
    )


def reported() -> str:
    """Table of errors that users reported."""
    return table(
        ["reported in", "asked for", "allocated", "predicted: asked for", "allocated"],
        [
            [row["source"], *(f"{row[key]} GiB" for key in list(row)[3:])]
            for row in rows("benchmarks/virtual/results/messages.csv")
        ],
    )


def several_cards(key: str) -> Errors:
    """Errors of published runs on several cards."""
    found = rows("benchmarks/virtual/results/several_cards.csv")
    return Errors(float(row[key]) for row in found if row[key])


def several_rows() -> str:
    """Table of published runs on several cards."""
    heads = ["model, cards", "batch, recomputed", "compiled", "GiB of a card", "predicted", "tokens/s of a card"]
    body = []
    for row in rows("benchmarks/virtual/results/several_cards.csv"):
        if row["predicted_rate"]:
            model = f"{row['model']}, {row['cards']} {row['card']}"
            batch = f"{row['batch']} x {row['length']}, {row['checkpointing']}"
            memory = [row["measured_gib"], row["predicted_gib"] if row["measured_gib"] else ""]
            body.append([model, batch, row["compile"], *memory, row["measured_rate"], row["predicted_rate"]])
    return table([*heads, "predicted"], body)


def fakegpu(key: str) -> Errors:
    """Errors of the rows of FakeGPU's tables that were played: ours (`error_pct`) or its own (`their_error_pct`)."""
    found = rows("benchmarks/virtual/results/fakegpu.csv")
    return Errors(float(row[key]) / 100 for row in found if row["error_pct"])


def fakegpu_rows() -> str:
    """Table of FakeGPU's measurements, with its error and ours."""
    body = []
    for row in rows("benchmarks/virtual/results/fakegpu.csv"):
        if row["error_pct"]:
            kind = {"qwen_fsdp_sft": "FSDP", "qwen_fsdp2_lora_sft": "FSDP2, LoRA"}.get(
                row["script"].removesuffix("_memory_worker.py"), ""
            )
            what = [row["model"], kind, row["args"].replace("--", ""), row["ranks"], f"{row['card']}, {row['torch']}"]
            predicted = f"{int(row['predicted_bytes']) / 2**30:.3f}"
            errors = [f"{row['their_error_pct']}%", f"{float(row['error_pct']):+.2f}%"]
            body.append([*what, row["measured_gib"], predicted, *errors])
    heads = ["Qwen3.5", "spread by", "arguments", "ranks", "card, torch", "measured GiB", "predicted"]
    return table([*heads, "FakeGPU's error", "ours"], body)


def attacks() -> str:
    """Table of the attacks on one process, with what was lost."""
    record = json.loads((BENCHMARKS / "recovery/results/chaos.json").read_text())
    found = [problem.partition(":")[0] for problem in record["problems"]]
    body = [[what, f"{record['trials'][name]:,}", found.count(name)] for name, what in ATTACKS.items()]
    return table(["attack", "trials", "lost, traceback or left behind"], body)


def attacks_on_ranks() -> str:
    """Table of the attacks on runs that are spread over processes."""
    record = json.loads((BENCHMARKS / "recovery/results/shards.json").read_text())
    body = [
        [what, record[attack]["trials"][name], len(record[attack]["problems"])]
        for (attack, name), what in ATTACKS_ON_RANKS.items()
    ]
    return table(["attack", "trials", "lost, hung or wrong"], body)


def how_true() -> str:
    """The README's table."""
    one, other, host, peak, others = card(), step_time(False), host_step(), process_peak(), public()
    cards = "memory on A100, H100, B200, RTX 3090 and 4090, measured by others"
    return table(
        ["predicted, against", "rows", "median error", "worst miss"],
        [
            ["memory reserved on a real RTX 3060, measured by xMem's authors", one.count, one.median, one.worst],
            [cards, others["count"], others["median"], others["worst"]],
            ["memory of a step on the host, PyTorch's profiler", host["count"], host["median"], host["worst"]],
            ["peak of a training process under limits of the kernel", peak.count, peak.median, peak.worst],
            ["time of a GPT-2 step in published runs", other.count, other.median, other.worst],
        ],
    )


ANSWERS = {"error": "an error of its own"}
"""Answers of plays where the page has other words for them than the rows."""


def programs() -> str:
    """Public programs that were played, one a row."""
    header = ["program", "card", "answer", "highest allocated", "CPU seconds", "host MiB"]
    return table(header, map(_program, _programs()))


def _programs() -> list[Row]:
    return rows("benchmarks/virtual/results/programs.csv")


def _program(row: Row) -> list[str]:
    peak = int(row["peak_allocated_bytes"]) / 2**20
    peak_text = f"{peak / 1024:.2f} GiB" if peak >= 1024 else f"{peak:.1f} MiB"
    name = f"[{row['program']}]({row['source']})"
    answer = ANSWERS.get(row["outcome"], row["outcome"])
    return [name, row["card"], answer, peak_text, f"{float(row['cpu_seconds']):.0f}", row["host_mib"]]


def program_commands() -> str:
    """Their commands, behind `tightfit dryrun --gpu CARD`, and what to know of each."""
    return "\n".join(
        f"- {row['program']} (`{row['path']}`, {row['commit']}): `{row['command']}`. {row['note']}"
        for row in _programs()
    )


def figures() -> dict[str, object]:
    """All of it, by the name that a page has for it."""
    return {
        "card": card(),
        "xmem": xmem(),
        "speed_set": step_time(True),
        "speed_other": step_time(False),
        "peak": process_peak(),
        "host": host_step(),
        "processor": processor(),
        "older": older_processor(),
        "disturbed": disturbed(),
        "recovery": recovery,
        "several_memory": several_cards("memory_error"),
        "several_rate": several_cards("rate_error"),
        "several_rows": several_rows(),
        "attacks": attacks(),
        "attacks_on_ranks": attacks_on_ranks(),
        "fakegpu_ours": fakegpu("error_pct"),
        "fakegpu_theirs": fakegpu("their_error_pct"),
        "fakegpu_rows": fakegpu_rows(),
        "speeds": speeds(),
        "limits": limits(),
        "card_rows": card_rows(),
        "public": public(),
        "public_sources": public_sources(),
        "public_misses": public_misses(),
        "reported": reported(),
        "how_true": how_true(),
        "cards": len(rows("src/tightfit/gpus.csv")),
        "programs": programs(),
        "program_commands": program_commands(),
    }


def with_table(text: str) -> str:
    """Return the README with its table written anew."""
    return re.sub(
        r"(<!-- written by benchmarks/figures.py -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{how_true()}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
