"""The package in Python: how records show themselves, errors of calls, kernels and threads, names and types."""

import asyncio
import doctest
import io
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from runs import environment, here
from test_report_html import EVIL, EVIL_LOG, FAILURE, PLAIN_LOG, a_plan, an_explanation, findings

import tightfit
from tightfit.display import Displayed
from tightfit.planner.plan_record import plan_record
from tightfit.units import GIB
from tightfit.vgpu.records import Failure, Findings

TINY = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 64, "block_size": 8, "batch_size": 2, "compile": False}
ALLOWED_TAGS = {"div", "span", "b", "i", "br", "pre", "details", "summary", "ul", "ol", "li"} | {
    *("table", "thead", "tbody", "tr", "th", "td")
}
"""Of those that JupyterLab's sanitizer lets pass (packages/apputils/src/sanitizer.ts)."""
ALLOWED_STYLES = {
    *("background-color", "border-bottom", "border-collapse", "border-left", "cursor", "display", "font-weight"),
    *("height", "left", "line-height", "margin", "margin-right", "max-width", "min-width", "opacity", "overflow-wrap"),
    *("padding", "padding-left", "position", "text-align", "top", "vertical-align", "white-space", "width"),
}


def failed(**changes: object) -> Findings:
    failure = msgspec.convert({**FAILURE, **changes}, Failure)
    return msgspec.structs.replace(findings(), outcome="out_of_memory", failure=failure)


class Tags(HTMLParser):
    """Tags with their attributes, and that each is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "br":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class TestLine:
    """repr: the verdict, the peak and its place, in one line."""

    def test_of_findings(self) -> None:
        assert repr(findings()) == (
            "<Findings: FITS on GeForce RTX 3060 12GB, 12.00 GiB, 1.00 GiB of it used by others: at most 2.29 GiB in "
            "use, 8.71 GiB left; peak in the phase forward>"
        )
        assert repr(failed()).endswith(
            "; 6.00 GiB asked for and 2.00 GiB free in the phase forward, at deep/down/model.py:7 in GPT.forward>"
        )

    def test_of_a_plan(self) -> None:
        assert repr(a_plan()) == (
            "<PlanResult: 7 sequences at once, 69 passes a step, all logits kept, compiled; at most 9.00 GiB of the "
            "10.00 GiB that GeForce RTX 3060 12GB has for it, in the phase backward>"
        )
        assert repr(a_plan(fits=False)) == (
            "<PlanResult: nothing fits GeForce RTX 3060 12GB; the least needs 9.00 GiB of 5.00 GiB>"
        )

    def test_of_an_explanation(self) -> None:
        assert repr(tightfit.explain(PLAIN_LOG)).startswith(
            "<Explanation: In the forward pass, 6.14 GiB were asked for and 2.68 GiB of 11.69 GiB were free: "
        )
        assert repr(tightfit.explain("all is well")).startswith(
            "<Explanation: This log shows no failure: neither an error nor memory that ran out."
        )

    @pytest.mark.parametrize("record", [findings(), failed(), a_plan(), a_plan(fits=False), an_explanation()])
    def test_is_short_and_in_the_users_language(self, record: Displayed, monkeypatch: pytest.MonkeyPatch) -> None:
        assert len(repr(record)) < 320
        assert "\n" not in repr(record)
        monkeypatch.setenv("TIGHTFIT_LANG", "ja")
        assert isinstance(record, type(an_explanation())) or "フェーズ" in repr(record) or "ません" in repr(record)

    def test_has_no_control_characters(self) -> None:
        assert repr(failed(function="a\x1b[31m\nb")).endswith("in a[31m b>")

    def test_printing_gives_the_report(self) -> None:
        assert str(findings()).splitlines()[0].startswith("FITS on GeForce RTX 3060 12GB")
        assert "Memory by category" in str(findings())
        assert "--micro_batch=7" in str(a_plan())
        assert str(tightfit.explain(PLAIN_LOG)).startswith("Problem")


class TestHtml:
    """What a notebook shows."""

    @pytest.mark.parametrize(
        "record",
        [
            *(findings(notes=[EVIL], stopped_because=EVIL), failed(function=EVIL, file=EVIL, message=EVIL)),
            *(a_plan(note=EVIL, category=EVIL), a_plan(fits=False), tightfit.explain("all is well")),
            *(an_explanation(EVIL_LOG, lang, EVIL) for lang in ("en", "ja")),
        ],
    )
    def test_survives_the_sanitizers_of_notebooks(self, record: Displayed) -> None:
        page = Tags(record._repr_html_())
        assert {tag for tag, _ in page.seen} <= ALLOWED_TAGS
        for _, attributes in page.seen:
            assert attributes.keys() <= {"style", "lang", "open"}
            for style in filter(None, (attributes.get("style") or "").split("; ")):
                name, _, value = style.partition(": ")
                assert name in ALLOWED_STYLES, style
                assert value, style
                assert "var(" not in value

    def test_takes_the_text_colour_of_the_notebook(self) -> None:
        """A notebook's theme is its own, whatever the system's; nothing but strips and marks has a colour."""
        for tag, attributes in Tags(failed()._repr_html_()).seen:
            style = attributes.get("style") or ""
            assert "; color" not in f"; {style}"
            assert "background-color" not in style or tag in ("div", "span") or "transparent" in style

    def test_memory_by_category_is_one_bar_to_the_end_of_the_card(self) -> None:
        found = failed()
        page = Tags(found._repr_html_())
        assert "Memory of the card when it failed" in page.text
        styles = [each.get("style") or "" for _, each in page.seen]
        strip = next(at for at, style in enumerate(styles) if "#e6e7e9" in style)
        parts = [style for style in styles[strip + 1 : strip + 8] if "width: " in style]
        edges = [
            (float(each.split("left: ")[1].split("%")[0]), float(each.split("; width: ")[1].split("%")[0]))
            for each in parts
        ]
        whole = GIB * (1 + 8 + 6) + found.gpu.context_bytes
        assert len(edges) == 6, "others, outside, logits, parameters, cache, the request"
        assert edges[0] == (0.0, pytest.approx(100 * GIB / whole, abs=0.01))
        assert sum(edges[-1]) == pytest.approx(100, abs=0.02)
        for (left, width), (following, _) in pairwise(edges):
            assert left + width == pytest.approx(following, abs=0.02)

    def test_folds_all_but_the_answer(self) -> None:
        tags = Tags(failed()._repr_html_()).seen
        folded = ["open" in attributes for tag, attributes in tags if tag == "details"]
        assert folded == [True, True, False, False, False, False]


class TestRecords:
    def test_encode_and_compare_as_before(self) -> None:
        found = failed()
        decoded = msgspec.json.decode(msgspec.json.encode(found), type=Findings)
        assert decoded == found
        assert b"views" not in msgspec.json.encode(found)
        assert "views" not in str(msgspec.json.schema(Findings))
        assert plan_record(a_plan()).best is not None

    def test_they_load_no_torch_and_no_report(self) -> None:
        program = (
            "import sys, tightfit.vgpu.records, tightfit.diagnosis.explanation\n"
            "print('torch' in sys.modules, any(name.startswith('tightfit.report') for name in sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stdout == "False False\n"


NO_GPU = "'RTX 9999' is not in the table of GPUs (nearest names: "
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: tightfit.plan(batchsize=3), "batchsize is not a key; did you mean batch_size?"),
    (lambda: tightfit.train(batchsize=3), "batchsize is not a key; did you mean batch_size?"),
    (lambda: tightfit.explain("x", batchsize=3), "batchsize is not a key; did you mean batch_size?"),
    (lambda: tightfit.plan(gpus="A100"), "gpus is not a key; did you mean gpu?"),
    (lambda: tightfit.plan(qqq=1), "qqq is not a key; tightfit.Config has them all"),
    (lambda: tightfit.plan(3), "3 is neither a tightfit.Config nor the path of a config file"),  # type: ignore[arg-type]
    (lambda: tightfit.plan(gpu=3), "gpu takes the name of a card, such as 'RTX 3060 12GB', got 3"),  # type: ignore[arg-type]
    (lambda: tightfit.plan(gpu="A100", memory_bytes="12GiB"), "memory_bytes takes a whole number of bytes"),  # type: ignore[arg-type]
    (lambda: tightfit.plan(used_bytes=-1), "used_bytes takes a whole number of bytes"),
    (lambda: tightfit.plan(gpu="A100", used_bytes=-1), "used_bytes takes a whole number of bytes"),
    (lambda: tightfit.plan(gpu="A100", used_bytes=1 << 40), "1.00 TiB used by other programs leave nothing of"),
    (lambda: tightfit.plan(gpu="A100", capability="8.6"), "capability takes two whole numbers, such as (8, 6)"),  # type: ignore[arg-type]
    (lambda: tightfit.dryrun("missing.py", gpu="A100"), "missing.py is not a file; give the path of the training"),
    (lambda: tightfit.dryrun(Path("missing.py"), gpu="A100"), "missing.py is not a file; give the path"),
    (lambda: tightfit.dryrun(3, gpu="A100"), "3 is neither a training script nor a function"),  # type: ignore[arg-type]
    (lambda: tightfit.dryrun(__file__, gpu="RTX 9999"), NO_GPU),
    (lambda: tightfit.dryrun(print, gpu="RTX 9999"), NO_GPU),
    (lambda: tightfit.dryrun(__file__, gpu=None), "gpu takes the name of a card"),  # type: ignore[arg-type]
    (lambda: tightfit.dryrun(__file__, gpu="A100", steps=0), "steps=0 must be at least 1"),
    (lambda: tightfit.dryrun(__file__, gpu="A100", steps="2"), "steps=2 must be at least 1"),  # type: ignore[arg-type]
    (lambda: tightfit.dryrun(__file__, gpu="A100", timeout_s="x"), "timeout=x must be more than 0 seconds"),  # type: ignore[arg-type]
    (lambda: tightfit.dryrun(__file__, gpu="A100", snapshot=3), "snapshot takes the path of a file, got 3"),  # type: ignore[arg-type]
    (lambda: tightfit.dryrun(print, threading.Lock(), gpu="A100"), "builtins:print cannot be sent to another process"),
    (lambda: tightfit.VirtualGPU("RTX 9999"), NO_GPU),
    (lambda: tightfit.VirtualGPU(3), "gpu takes the name of a card"),  # type: ignore[arg-type]
    (lambda: tightfit.VirtualGPU("A100", used_bytes=1 << 40), "1.00 TiB used by other programs leave nothing of"),
    (lambda: tightfit.explain(3), "3 is not a log; give its text, its path, or an open file"),  # type: ignore[arg-type]
    (lambda: tightfit.explain(None), "None is not a log"),
    (lambda: tightfit.explain("x", gpu=3), "gpu takes the name of a card"),  # type: ignore[arg-type]
    (lambda: tightfit.explain("x", lang="fr"), "--lang must be one of en, ja, got 'fr'"),
    (lambda: tightfit.explain(b"\x00\x01\x02\xff" * 999), "the log is not a text"),
]
"""Calls, and the beginning of the sentence that each raises."""
SHARED: list[tuple[Callable[[], object], list[str]]] = [
    (lambda: tightfit.plan("nofile.py"), ["plan", "nofile.py"]),
    (lambda: tightfit.plan(Path("nofile.py")), ["plan", "nofile.py"]),
    (lambda: tightfit.train("nofile.py"), ["train", "nofile.py"]),
    (lambda: tightfit.plan(os.curdir), ["plan", os.curdir]),
    (lambda: tightfit.plan(batch_size="many"), ["plan", "--batch_size=many"]),
    (lambda: tightfit.plan(n_head=5), ["plan", "--n_head=5"]),
    (lambda: tightfit.plan(dropout=1), ["plan", "--dropout=1"]),
    (lambda: tightfit.plan(gpu="RTX 9999"), ["plan", "--gpu", "RTX 9999"]),
    (lambda: tightfit.plan(gpu="A100", memory_bytes=0), ["plan", "--gpu", "A100", "--memory", "0"]),
    (lambda: tightfit.dryrun("no.py", gpu="A100"), ["dryrun", "--gpu", "A100", "no.py"]),
    (lambda: tightfit.dryrun(__file__, gpu="RTX 9999"), ["dryrun", "--gpu", "RTX 9999", __file__]),
    (lambda: tightfit.dryrun(__file__, gpu="T4", used_bytes=1 << 40), ["dryrun", "--gpu=T4", "--used=1TiB", __file__]),
    (lambda: tightfit.explain(Path("no.log")), ["explain", "no.log"]),
    (lambda: tightfit.explain("no.log"), ["explain", "no.log"]),
    (lambda: tightfit.explain(Path(os.curdir)), ["explain", os.curdir]),
    (lambda: tightfit.explain("x", config="nofile.py"), ["explain", __file__, "--config", "nofile.py"]),
]
"""Calls, and the command that makes the same mistake."""


class TestMistakes:
    """Each is a TightfitError with one sentence, raised before any process is started."""

    @pytest.mark.parametrize(("call", "said"), MISTAKES)
    def test_are_one_sentence(self, call: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(subprocess, "Popen", None)
        with pytest.raises(tightfit.TightfitError) as raised:
            call()
        assert str(raised.value).startswith(said)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(("call", "words"), SHARED)
    def test_are_the_commands(
        self, call: Callable[[], object], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(subprocess, "Popen", None)
        with pytest.raises(tightfit.TightfitError) as raised:
            call()
        done = here(words)
        assert (done.code, done.err) == (2, f"tightfit: {raised.value}\n")


class TestLogs:
    """What `explain` takes."""

    def test_a_log_in_every_form(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "run.log"
        path.write_text(PLAIN_LOG)
        (tmp_path / "odd name").write_text(PLAIN_LOG)
        sources = [PLAIN_LOG, PLAIN_LOG.encode(), path, str(path), "run.log", "odd name", io.StringIO(PLAIN_LOG)]
        with path.open("rb") as binary, path.open() as text:
            found = {repr(tightfit.explain(source)) for source in [*sources, binary, text]}
        assert found == {repr(tightfit.explain(PLAIN_LOG))}

    @pytest.mark.parametrize("nothing", ["", b"", "\n", io.BytesIO()])
    def test_no_text(self, nothing: Any) -> None:
        found = tightfit.explain(nothing)
        assert found.facts is None
        assert repr(found) == "<Explanation: There is no text to explain.>"

    def test_the_users_language(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIGHTFIT_LANG", "ja")
        assert tightfit.explain("").language == "ja"
        assert tightfit.explain("", lang="en").language == "en"


class TestConfigurations:
    def test_keys_win_over_a_file_and_an_object(self, tmp_path: Path) -> None:
        from tightfit.config.calls import read_call

        file = tmp_path / "config.py"
        file.write_text("batch_size = 4\nblock_size = 64\nunknown_name = 3\n")
        notes: list[str] = []
        found = read_call(tightfit.Config, file, {"block_size": 32}, warn=notes.append)
        assert (found.config.batch_size, found.config.block_size) == (4, 32)
        assert [found.sources[key] for key in ("batch_size", "block_size", "n_layer")] == [
            f"{file}:1",
            "call",
            "default",
        ]
        assert len(notes) == 1
        found = read_call(tightfit.Config, tightfit.Config(n_layer=3), {"n_layer": 12}, warn=notes.append)
        assert (found.config.n_layer, found.sources["n_layer"]) == (12, "call"), "given, although it is the default"

    def test_names_in_a_file_that_are_no_keys_are_warned_of(self, tmp_path: Path) -> None:
        file = tmp_path / "config.py"
        file.write_text("unknown_name = 1\n")
        with pytest.warns(UserWarning, match="unknown_name") as seen, pytest.raises(tightfit.TightfitError):
            tightfit.plan(file, gpu="RTX 9999")
        assert seen[0].filename == __file__


PROGRAM = """
import asyncio, sys, threading, time
print("imported", __name__)
import tightfit

def inner(count):
    import torch
    return torch.empty(count, device="cuda")

def call(count):
    inner(count)

def planned():
    return tightfit.plan(gpu="T4", gradient_accumulation_steps=1, **{tiny})

async def main():
    first = planned()
    started = time.process_time()
    again = planned()
    print("again", again.traced, time.process_time() - started < 0.5, repr(first) == repr(again))

asyncio.run(main())
found = []
worker = threading.Thread(target=lambda: found.append(tightfit.dryrun(call, 1 << 40, gpu="T4")))
worker.start()
worker.join()
print(found[0].outcome, found[0].failure.function, found[0].failure.file == __file__, found[0].failure.line)
print("torch" in sys.modules)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_a_running_loop_and_a_thread(own_cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(tiny=TINY))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=240, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "imported __main__",
        "again 0 True True",
        "out_of_memory inner True 8",
        "False",
    ]
    assert "in inner" in done.stderr, "the traceback of the play"


def test_a_package_that_only_sys_path_has_plays_itself(tmp_path: Path) -> None:
    """As in a notebook that adds a clone to sys.path: the process that plays imports the same lines."""
    (tmp_path / "play.py").write_text("import tightfit, sys\nprint(tightfit.__file__, file=sys.stderr)\n")
    program = (
        f"import sys; sys.path.insert(0, {str(Path(tightfit.__file__).parents[1])!r})\n"
        "import tightfit; print(tightfit.dryrun('play.py', gpu='T4').outcome)"
    )
    environ = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=environ,
        cwd=tmp_path,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("fits\n", f"{tightfit.__file__}\n")


def test_a_loop_that_runs_may_explain() -> None:
    async def explained() -> str:
        return repr(tightfit.explain(PLAIN_LOG))

    assert asyncio.run(explained()) == repr(tightfit.explain(PLAIN_LOG))


class TestNames:
    def test_completion_offers_the_public_names_alone(self) -> None:
        assert dir(tightfit) == tightfit.__all__

    @pytest.mark.parametrize("name", ["plan", "dryrun", "explain", "train", "VirtualGPU"])
    def test_help_explains_errors(self, name: str) -> None:
        assert "TightfitError" in (getattr(tightfit, name).__doc__ or "")

    @pytest.mark.slow
    def test_skipped_examples_are_true(self, own_cache: Path) -> None:
        """Those that start processes, which take seconds."""
        for name in ("plan", "dryrun"):
            function = getattr(tightfit, name)
            text = function.__doc__.replace("doctest: +SKIP", "doctest: +ELLIPSIS")
            names = {**vars(tightfit), "__name__": "__main__"}
            test = doctest.DocTestParser().get_doctest(text, names, name, tightfit.__file__, 0)
            assert doctest.DocTestRunner().run(test).failed == 0

    @pytest.mark.slow
    def test_a_users_program_has_types(self, tmp_path: Path) -> None:
        (tmp_path / "program.py").write_text(
            textwrap.dedent("""
            from pathlib import Path
            import tightfit

            found = tightfit.plan("config.py", gpu="A100", used_bytes=2**30, batch_size=3, compile=False)
            peak: int = found.choice.best.peak_bytes if found.choice.best else 0
            play = tightfit.dryrun(Path("train.py"), "--batch_size=3", gpu="A100", timeline=True)
            left: int = play.free_bytes
            why = tightfit.explain(Path("oom.log"), config=tightfit.Config(batch_size=3))
            paste: tuple[str, ...] = why.best.paste if why.best else ()
            reveal_type(tightfit.VirtualGPU("A100").findings())
            tightfit.dryrun("train.py", gpu=3)
            """)
        )
        words = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "program.py"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
        assert 'Revealed type is "tightfit.vgpu.records.Findings"' in done.stdout
        errors = [line for line in done.stdout.splitlines() if ": error: " in line]
        assert len(errors) == 1, errors
        assert 'Argument "gpu" to "dryrun" has incompatible type "int"; expected "str"' in errors[0]
