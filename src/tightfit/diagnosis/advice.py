"""The remedies for a failure that was not played: those that cure this case first, in the user's own words."""

import functools
from collections.abc import Iterator

from msgspec.structs import replace

from tightfit.diagnosis.cause_records import COMPUTED
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.figure_causes import cache_is_large, fixes_of_figures
from tightfit.diagnosis.framework_words import Pasted, pasted
from tightfit.diagnosis.remedies import (
    DOES_NOT_FIT,
    NO_EFFECT,
    UNCHECKED,
    Remedy,
    Resized,
    close_others,
    empty_cache,
    expandable_segments,
    ranked,
)
from tightfit.oomlog.facts import Facts
from tightfit.tables import read_table

_PICTURES = frozenset(
    {"ultralytics", "mmdet", "timm", "diffusers", "kohya", "detectron2", "dreambooth_extension", "webui", "comfyui"}
)
_WITHOUT_BATCH = ("gaussian_splatting", "comfyui", "webui")
"""Programs that have no batch to make smaller."""
_SHOWN_CURES = 4
_PARTS = 4
"""Passes into which a printed batch is divided: 64 x 1 becomes 16 x 4."""


@functools.cache
def _tables() -> dict[str, dict[str, str | list[str]]]:
    return read_table("tightfit.diagnosis", "advice.toml", dict[str, dict[str, str | list[str]]])


def applicability(code: str) -> str:
    """Return exact, changes_result, needs_hardware or to_be_checked."""
    return str(_tables()["applicability"].get(code, "to_be_checked"))


def advice(facts: Facts, evidence: Evidence) -> tuple[Remedy, ...]:
    """Return the remedies, those that cure this case first; a measured verdict that one does not help is kept."""
    cures = [_remedy(code, evidence) for code in _codes(facts, evidence)]
    if evidence.framework in ("jax", "tensorflow"):
        return ranked(cures)
    others, segments = close_others(facts), expandable_segments(facts)
    first = list(fixes_of_figures(facts))
    if others.reason == "others_might_do" and not any(each.code == "set_device" for each in first):
        first.append(others)
    last = [others] if others.verdict in (DOES_NOT_FIT, NO_EFFECT) else []
    if segments.reason == "cache_might_do" and "more_free_than_requested" not in facts.notes:
        cures.insert(0 if cache_is_large(facts) else min(len(cures), _SHOWN_CURES), segments)
    elif segments.verdict == DOES_NOT_FIT:
        last.insert(0, segments)
    return ranked([*first, *cures, *last, empty_cache(facts)])


def _codes(facts: Facts, evidence: Evidence) -> list[str]:
    """Return the codes of remedies that this run can take, the surest first."""
    codes = [code for cause in _lists(facts, evidence) for code in _tables()["fixes"][cause]]
    return [code for code in dict.fromkeys(codes) if _applies(code, facts, evidence)]


def _lists(facts: Facts, evidence: Evidence) -> Iterator[str]:
    """Yield the lists of advice.toml that fit this failure, the most fitting first."""
    budget, grows = evidence.budget, evidence.grows
    if budget is not None and budget.exceeds:
        yield "training" if budget.what == "training" or evidence.trains else "model"
    trains = evidence.trains or (budget is not None and budget.what == "training")
    if evidence.gathers_on_first_card(facts):
        yield "cards"
    if grows is not None:
        yield "training" if grows == "model" and trains else grows
        yield from ["eval"] if facts.phase == "eval" else []
        return
    if facts.phase in _tables()["fixes"]:
        yield str(facts.phase)
    if facts.phase in (None, "forward", "loss", "backward", "compile", "setup", "optimizer"):
        yield "unknown"


def _applies(code: str, facts: Facts, evidence: Evidence) -> bool:
    run, keeps_nothing, program = evidence.run, facts.phase in ("eval", "sample"), evidence.framework
    is_known = program not in (None, "nanogpt")
    done = {
        "split_general": evidence.batch_is_one or program in _WITHOUT_BATCH or (keeps_nothing and is_known),
        "checkpointing_general": keeps_nothing or "checkpointing" in run.signs,
        "fused_attention": "flash" in run.signs,
        "lora": bool(run.signs & {"lora", "qlora"}),
        "qlora": bool(run.signs & {"qlora", "four_bit"}),
        "quantized_weights": bool(run.signs & {"qlora", "four_bit"}),
        "smaller_weights": bool(run.signs & {"qlora", "four_bit"}),
        "shard": run.numbers.get("zero_stage") == 3,
        "half_precision": any(word in run.texts.get("dtype", "") for word in ("bf16", "fp16", "float16", "16-")),
        "optimizer_8bit": "8bit" in run.texts.get("optimizer", "").lower(),
        "release_logits": not any(each.function == "estimate_loss" for each in facts.frames),
    }
    if done.get(code, False):
        return False
    if code == "smaller_inputs":
        return not _applies("shorter_length", facts, evidence) and not _applies("smaller_picture", facts, evidence)
    if code == "shorter_length" and program in _PICTURES:
        return False
    needs_words = code in _tables()["needs_words"]["codes"]
    return not needs_words or pasted(code, run.frameworks, _values(evidence)) is not None


def _remedy(code: str, evidence: Evidence) -> Remedy:
    words = _own_option(code, evidence) or pasted(code, evidence.run.frameworks, _values(evidence))
    effect = applicability(code)
    remedy = Remedy(
        code=code,
        verdict=UNCHECKED,
        reason=code,
        label=COMPUTED,
        exact={"exact": True, "changes_result": False}.get(effect),
        applicability=effect,
        paste=words.lines if words else (),
        page=words.page if words else "",
    )
    batch, size, passes = _divided(evidence)
    if code == "split_general" and batch and size and passes:
        change = Resized(size=size, passes=passes, batch=batch, accumulation=_accumulation(evidence))
        return replace(remedy, code="split_logged", reason="split_general", change=change)
    return remedy


def _accumulation(evidence: Evidence) -> int:
    return evidence.run.numbers.get("accumulation", 1)


def _divided(evidence: Evidence) -> tuple[int | None, int | None, int | None]:
    """Return the printed batch, a quarter of it, and the accumulation that keeps the sequences of a step."""
    batch = evidence.run.numbers.get("batch_size")
    if not batch or batch < 2 or "data_parallel" in evidence.run.signs:
        return None, None, None
    size = max(each for each in range(1, max(batch // _PARTS, 1) + 1) if batch % each == 0)
    return batch, size, batch // size * _accumulation(evidence)


def _values(evidence: Evidence) -> dict[str, int | str]:
    """Return the values to fill into the lines of frameworks.toml."""
    _, size, passes = _divided(evidence)
    length = evidence.run.numbers.get("length")
    return {
        "size": size or "BATCH/4",
        "passes": passes or "4*ACCUMULATION",
        "half": length // 2 if length else "HALF",
    }


def _own_option(code: str, evidence: Evidence) -> Pasted | None:
    """Return the user's own options, as printed, for a program that is not known."""
    names, (_, size, passes) = evidence.run.names, _divided(evidence)
    if code != "split_general" or evidence.framework is not None or size is None:
        return None
    lines = [_option(names["batch_size"], size)] if "batch_size" in names else []
    if lines and "accumulation" in names and passes:
        lines.append(_option(names["accumulation"], passes))
    return Pasted(lines=tuple(lines)) if lines else None


def _option(name: str, value: int) -> str:
    return f"{name} {value}" if name.startswith("-") else f"{name} = {value}"
