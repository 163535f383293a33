"""The sections of what to change in a script that does not fit."""

import shlex
from collections.abc import Mapping, Sequence

from tightfit.questions.suggest import Suggestion, Suggestions, Tried
from tightfit.report.dryrun_page import card_text
from tightfit.report.question_pages import step_time
from tightfit.report.sections import Page, Section
from tightfit.units import format_bytes
from tightfit.wording import say, term
from tightfit.wording.report import Words


def suggest_page(found: Suggestions, t: Words) -> Page:
    """Lay out the changes with which a script fits, each with its figures and the lines to change."""
    remarks = list(dict.fromkeys(_tried(each, t) for each in found.tried))
    if not found.files_tried:
        remarks.append(say("questions.suggest_page.no_files"))
    cost = say("questions.suggest_page.cost", plays=found.plays, seconds=found.seconds)
    return Page(
        title=say("questions.suggest_page.title", script=found.script),
        verdict=_verdict(found, t),
        is_bad=not found.fits and not found.suggestions,
        facts=[(say("questions.suggest_page.as_it_is"), format_bytes(found.device_bytes), _left(found))],
        sections=[
            *(_suggestion(number, each, t) for number, each in enumerate(found.suggestions, start=1)),
            Section(id="remarks", title=t("dryrun", "remarks"), points=[*remarks, cost]),
        ],
    )


def _verdict(found: Suggestions, t: Words) -> str:
    card = card_text(found.gpu, t)
    if found.fits:
        return say("questions.suggest_page.fits", script=found.script, card=card)
    if not found.suggestions:
        return say("questions.suggest_page.none", script=found.script, card=card)
    return say("questions.suggest_page.found", script=found.script, card=card, count=len(found.suggestions))


def _left(found: Suggestions) -> str:
    if found.free_bytes >= 0 and not found.fits:
        return say("questions.suggest_page.caught")
    if found.free_bytes >= 0:
        return say("questions.suggest_page.left", free=found.free_bytes)
    return say("questions.suggest_page.missing", missing=-found.free_bytes)


def _suggestion(number: int, each: Suggestion, t: Words) -> Section:
    effects = [say("questions.suggest_page.peak", peak=each.device_bytes, free=each.free_bytes)]
    effects.append(_result(each))
    if each.costs_time:
        effects.append(say("questions.suggest_page.costs_time"))
    if each.step:
        effects.append(say("questions.suggest_page.step", time=step_time(each.step.seconds)))
    parts = [shlex.join(each.command), each.diff.rstrip("\n")]
    return Section(
        id=f"change-{number}",
        title=f"{number}. {titles(each.changes, t)}{_values(each.values, t)}",
        paragraphs=[
            t("page", "separator").join(effects),
            say("questions.suggest_page.played", reason=each.reason),
        ],
        code="\n".join(filter(None, parts)),
    )


def _result(each: Suggestion) -> str:
    if not each.is_exact:
        return say("questions.suggest_page.changes_result")
    if "batch" in each.changes:
        return say("questions.suggest_page.exact_batch")
    return say("questions.suggest_page.exact")


def titles(codes: Sequence[str], t: Words) -> str:
    """Return the words for kinds of changes."""
    return t("page", "separator").join(term("questions.suggested", code) for code in codes)


def _tried(each: Tried, t: Words) -> str:
    changes = f"{titles(each.changes, t)}{_values(each.values, t)}"
    if each.outcome == "error":
        return say("questions.suggest_page.fails", changes=changes)
    return say("questions.suggest_page.not_enough", changes=changes)


def _values(given: Mapping[str, int], t: Words) -> str:
    values = t("page", "separator").join(f"{name} = {value}" for name, value in given.items())
    return f" ({values})" if values else ""
