"""Questions of `tightfit dryrun`: --largest, --all-gpus, --compare, --suggest."""

import argparse
from collections.abc import Callable, Sequence

from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.progress import Progress, shown
from tightfit.errors import ConfigError
from tightfit.questions.asking import Asked
from tightfit.report.sections import Page
from tightfit.simulation.client import Simulator
from tightfit.vgpu.command_line import program_word
from tightfit.vgpu.records import Settings
from tightfit.wording import say
from tightfit.wording.report import Words, words

_NOT_ANSWERED = ("html", "timeline", "snapshot")
"""Options about one play."""


def answer(options: argparse.Namespace, settings: Settings) -> int:
    """Answer the one question that is asked, and print it. ConfigError for several, or an option without meaning."""
    question = _question(options)
    command = [options.script, *options.arguments]
    text = say("cli.progress.asking", script=program_word(command), question=question)
    with shown(text) as progress, Simulator(progress=progress.count, on_step=progress.count_steps) as simulator:
        asked = Asked.of(simulator, settings, command)
        record, page, fits = _ANSWERS[question](asked, options, progress)
    if options.json:
        print(as_json(record))
    else:
        from tightfit.report.terminal import page_text

        print(page_text(page(words(options.lang))), flush=True)
    return OK if fits else FAILED


Answer = tuple[object, Callable[[Words], Page], bool]


def _question(options: argparse.Namespace) -> str:
    given = {
        "--largest": options.largest,
        "--all-gpus": options.all_gpus,
        "--compare": options.compare is not None,
        "--suggest": options.suggest,
    }
    asked = [name for name, value in given.items() if value]
    if len(asked) > 1:
        raise ConfigError(say("cli.dryrun.one_question", options=", ".join(asked)))
    (question,) = asked
    unused = [f"--{name}" for name in _NOT_ANSWERED if getattr(options, name)]
    if question != "--largest" and options.multiple is not None:
        unused.append("--multiple")
    if question == "--all-gpus":
        unused += [f"--{name}" for name in ("gpu", "memory", "capability") if getattr(options, name)]
    if unused:
        raise ConfigError(say("cli.dryrun.not_with", option=unused[0], question=question))
    return question


def _largest(asked: Asked, options: argparse.Namespace, progress: Progress) -> Answer:
    from tightfit.questions.largest import largest
    from tightfit.report.question_pages import largest_page

    def tell(name: str, values: Sequence[int]) -> None:
        shown = say("cli.progress.several_values").join(map(str, values))
        progress.stage(say("cli.progress.valued", script=asked.script, name=name, values=shown))

    multiple = 1 if options.multiple is None else options.multiple
    found = largest(asked, options.largest, multiple=multiple, tell=tell)
    return found, lambda t: largest_page(found, t), found.largest is not None


def _all_gpus(asked: Asked, options: argparse.Namespace, progress: Progress) -> Answer:
    from tightfit.questions.cards import every_card
    from tightfit.report.question_pages import script_cards_page

    found = every_card(asked)
    return found, lambda t: script_cards_page(found, t), found.smallest is not None


def _compare(asked: Asked, options: argparse.Namespace, progress: Progress) -> Answer:
    from tightfit.questions.compare import compare
    from tightfit.report.question_pages import compare_page

    found = compare(asked, options.compare)
    return found, lambda t: compare_page(found, t), any(side.outcome == "fits" for side in found.sides)


def _suggest(asked: Asked, options: argparse.Namespace, progress: Progress) -> Answer:
    from tightfit.questions.suggest import suggest
    from tightfit.report.suggest_page import suggest_page, titles

    def tell(codes: Sequence[str]) -> None:
        several = say("cli.progress.several", count=len(codes))
        changes = titles(codes, words(options.lang)) if len(codes) == 1 else several
        progress.stage(say("cli.progress.suggesting", script=asked.script, changes=changes))

    found = suggest(asked, tell=tell)
    return found, lambda t: suggest_page(found, t), found.fits or bool(found.suggestions)


_ANSWERS: dict[str, Callable[[Asked, argparse.Namespace, Progress], Answer]] = {
    "--largest": _largest,
    "--all-gpus": _all_gpus,
    "--compare": _compare,
    "--suggest": _suggest,
}
