"""`tightfit dryrun`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.parser import Parser, capability
from tightfit.cli.progress import shown
from tightfit.config.sizes import parse_bytes
from tightfit.errors import ConfigError
from tightfit.vgpu.records import Findings, Settings, read_assumption
from tightfit.wording import say


class _CommandParser(Parser):
    """Parser of options before a command of any form: `train.py ...`, `-m pkg.train ...`, `torchrun ... train.py`."""

    def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        own, command = self._split(list(words))
        own, compared = _compared(own, self.names())
        misplaced = [each for each in command if each.partition("=")[0] == "--gpu"]
        if misplaced and not any(each.partition("=")[0] in ("--gpu", "-h", "--help") for each in own):
            raise ConfigError(say("cli.dryrun.misplaced", option=misplaced[0], script=command[0]))
        options, rest = super().read(own)
        if not command:
            raise ConfigError(say("vgpu.command.empty"))
        options.script, *options.arguments = command
        options.compare = compared
        if not options.gpu and not options.all_gpus:
            raise ConfigError(say("cli.parser.missing", names="--gpu", command=self.prog))
        return options, rest

    def _split(self, words: list[str]) -> tuple[list[str], list[str]]:
        """Split words into our options and the command, which begins at `--`, `-m` or the first other word."""
        place = 0
        while place < len(words):
            word = words[place]
            if word == "--":
                return words[:place], words[place + 1 :]
            if word == "-m" or not word.startswith("-"):
                break
            if word == "--compare":
                place = _end_of_changes(words, place + 1, self.names())
                continue
            action = self._option_string_actions.get(word)
            place += 2 if action is not None and action.nargs is None else 1
        return words[:place], words[place:]

    def names(self) -> set[str]:
        return set(self._option_string_actions)


def _is_change(word: str, names: set[str]) -> bool:
    """Return True for a variant of --compare: words of an option or a setting, and not ours or the command."""
    if word in ("--", "-m") or word.partition("=")[0] in names:
        return False
    return word.startswith("-") or "=" in word or " " in word or not word


def _end_of_changes(words: Sequence[str], place: int, names: set[str]) -> int:
    """Return the place behind the variants that begin at `place`."""
    while place < len(words) and _is_change(words[place], names):
        place += 1
    return place


def _compared(words: list[str], names: set[str]) -> tuple[list[str], list[str] | None]:
    """Take --compare and its variants out of our own words; argparse would read them as options."""
    if "--compare" not in words:
        return words, None
    start = words.index("--compare") + 1
    end = _end_of_changes(words, start, names)
    return [*words[: start - 1], *words[end:]], words[start:end]


def parser() -> _CommandParser:
    found = _CommandParser(
        "dryrun",
        say("cli.dryrun.about"),
        usage=say("cli.dryrun.usage"),
        examples=[
            'tightfit dryrun --gpu "RTX 3060" --used 2GiB train.py --batch_size=64',
            "tightfit dryrun --gpu A100 -- torchrun --nproc_per_node=8 train.py",
        ],
    )
    found.option("--gpu", say("cli.dryrun.gpu"))
    found.option("--memory", say("cli.dryrun.memory"))
    found.add_argument("--used", default="0", help=say("cli.option.used"))
    found.option("--context", say("cli.dryrun.context"))
    found.option("--capability", say("cli.option.capability"))
    found.option("--torch", say("cli.dryrun.torch"))
    found.add_argument("--steps", type=int, help=say("cli.dryrun.steps"))
    found.add_argument("--until", choices=("end", "eval", "steps"), help=say("cli.dryrun.until"))
    found.add_argument("--assume", action="append", default=[], metavar="EXPR=VALUE", help=say("cli.dryrun.assume"))
    found.add_argument("--timeout", type=float, help=say("cli.dryrun.timeout"))
    found.add_argument("--rank", type=int, default=0, help=say("cli.dryrun.rank"))
    found.flag("--network", say("cli.dryrun.network"))
    found.option("--snapshot", say("cli.dryrun.snapshot"))
    found.option("--timeline", say("cli.dryrun.timeline"))
    found.option("--html", say("cli.dryrun.html"))
    found.add_argument("--no-explain", dest="explain", action="store_false", help=say("cli.dryrun.no_explain"))
    found.option("--largest", say("cli.dryrun.largest"))
    found.add_argument("--multiple", type=int, help=say("cli.dryrun.multiple"))
    found.flag("--all-gpus", say("cli.dryrun.all_gpus"))
    found.add_argument("--compare", nargs="+", metavar="CHANGE", help=say("cli.dryrun.compare"))
    found.flag("--suggest", say("cli.dryrun.suggest"))
    found.flag("--json", say("cli.option.json"))
    found.add_argument("script", nargs="?", help=say("cli.dryrun.script"))
    found.add_argument("arguments", nargs=argparse.REMAINDER, help=say("cli.dryrun.arguments"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.timeline and not options.timeline.lower().endswith((".png", ".svg")):
        raise ConfigError(say("cli.dryrun.bad_picture", file=options.timeline))
    if options.largest or options.all_gpus or options.suggest or options.compare is not None:
        from tightfit.cli.asked import answer

        return answer(options, settings_of(options))
    if options.multiple is not None:
        raise ConfigError(say("cli.dryrun.multiple_of_what"))
    from tightfit.simulation.dry_run import dryrun_script

    signal.signal(signal.SIGTERM, _interrupt_once)  # a batch system's end, too, gets what was seen
    settings = settings_of(options)
    names = {"script": _program(options), "gpu": options.gpu}
    with shown(say("cli.progress.playing", **names), bar=False) as progress:

        def tell(steps: int) -> None:
            progress.stage(say("cli.progress.stepped", **names, steps=steps))

        found = dryrun_script(options.script, options.arguments, settings, on_step=tell)
    _write_pictures(found, options)
    if options.json:
        print(as_json(found))
    else:
        _show(found, options)
    return OK if found.outcome == "fits" else FAILED


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Interrupt as Ctrl-C does. `timeout` sends its signal twice: to the command, and to its group."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of the virtual GPU. ConfigError for a size that cannot be read."""
    return Settings(
        gpu=options.gpu or "",
        memory_bytes=parse_bytes(options.memory) if options.memory else None,
        used_bytes=parse_bytes(options.used),
        context_bytes=parse_bytes(options.context) if options.context else None,
        capability=capability(options.capability),
        steps=options.steps,
        until=options.until,
        assumed=tuple(map(read_assumption, options.assume)),
        timeout_s=options.timeout,
        network=options.network,
        rank=options.rank,
        torch=options.torch,
        timeline=bool(options.timeline or options.html),
        snapshot=os.path.abspath(options.snapshot) if options.snapshot else None,
    )


def _program(options: argparse.Namespace) -> str:
    """Return the word by which people know the command that is played."""
    from tightfit.vgpu.command_line import program_word

    return program_word([options.script, *options.arguments])


def _taken_by_script(options: argparse.Namespace) -> str:
    """Return our options that stand after the script, which got them."""
    names = parser().names()
    return " ".join(each for each in options.arguments if each.startswith("--") and each.partition("=")[0] in names)


def _write_pictures(found: Findings, options: argparse.Namespace) -> None:
    if options.timeline and found.timeline:
        from tightfit.report.tensor_texts import place_text
        from tightfit.report.timeline_picture import timeline_picture

        place = place_text(found.failure) if found.failure else ""
        timeline_picture(found.timeline, options.timeline, card=found.gpu.name, outcome=found.outcome, place=place)
    if options.html:
        from tightfit.report.html import findings_report
        from tightfit.report.page import write

        write(findings_report(found, lang=options.lang), options.html)


def _show(found: Findings, options: argparse.Namespace) -> None:
    from tightfit.report.dryrun_page import dryrun_page
    from tightfit.report.terminal import page_text
    from tightfit.wording.report import words

    sys.stderr.flush()
    print(page_text(dryrun_page(found, words(options.lang))), flush=True)
    if found.outcome == "error" and (taken := _taken_by_script(options)):
        print(f"\n{say('cli.dryrun.taken', options=taken, script=options.script)}")
    if found.failure and options.explain:
        from tightfit.cli.explained import text_for_terminal
        from tightfit.diagnosis.explaining import explain_dryrun

        with shown(say("cli.progress.checking", script=_program(options), gpu=found.gpu.name), bar=False):
            explanation = explain_dryrun(
                found, options.script, options.arguments, settings=settings_of(options), lang=options.lang
            )
        print(f"\n{text_for_terminal(explanation)}")
