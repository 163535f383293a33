"""The HTML report in headless Chromium: it draws, answers to pointer, keys and boxes, and loads nothing.

Needs the Python package playwright and a Chromium of the system: $CHROMIUM, or chromium or google-chrome in the path.
$AXE may name the axe.min.js of axe-core, which then looks for what keeps people out.
"""

import importlib.util
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report_html import EVIL_LOG, FAILURE, a_plan, a_run, a_timeline, an_explanation, findings, plan_report, tensor

from tightfit.report.html import explanation_report, findings_report, run_report
from tightfit.report.page import write
from tightfit.units import GIB, MIB
from tightfit.wording.report import LANGUAGES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:playwright")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
AXE = os.environ.get("AXE")
SECONDS = 6
"""A page has to be drawn by then. It takes 0.4 s on two cores of a server; a busy machine of a CI is slower."""
HIGHEST = (12 - 1 - 300 / 1024) * 1.14
"""GiB at the top of the chart of `dry`: a little more than the capacity."""
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def chromium(request: pytest.FixtureRequest) -> Iterator[Any]:
    missing = "chromium (apt install chromium)" if CHROMIUM is None else ""
    if importlib.util.find_spec("playwright") is None:
        missing = "playwright (pip install playwright)"
    if missing:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\nNOT TESTED: the report in a browser, for want of {missing}")
        pytest.skip(f"no {missing}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as starter:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = starter.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@dataclass
class Shown:
    """A page in the browser, with all that it complained of or asked for."""

    page: Any
    seconds: float
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def pixels(self, selector: str) -> dict[str, int]:
        """How many pixels of a chart's canvas have which colour."""
        return dict(
            self.page.evaluate(
                """(selector) => {
                const canvas = document.querySelector(selector), copy = canvas.cloneNode();
                const context = copy.getContext("2d", { willReadFrequently: true });
                context.drawImage(canvas, 0, 0);
                const { data } = context.getImageData(0, 0, copy.width, copy.height);
                const two = (value) => value.toString(16).padStart(2, "0");
                const counts = new Map();
                for (let i = 0; i < data.length; i += 4) {
                    if (data[i + 3] < 255) continue;
                    const hex = `#${two(data[i])}${two(data[i + 1])}${two(data[i + 2])}`;
                    counts.set(hex, (counts.get(hex) || 0) + 1);
                }
                return [...counts];
            }""",
                selector,
            )
        )

    def point(self, chart: str, x: float, y: float) -> None:
        """The pointer at a share of a plot's width and height."""
        over = self.page.locator(f"#{chart} .u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        self.page.evaluate(SETTLED)


@pytest.fixture
def show(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens HTML as a file; afterwards nothing may have been complained of, and nothing asked for but the file."""
    opened: list[Shown] = []

    def open_page(html: str, *, width: int = 1200, **options: Any) -> Shown:
        path = tmp_path / f"{len(opened)}.html"
        write(html, path)
        page = chromium.new_context(viewport={"width": width, "height": 800}, **options).new_page()
        shown = Shown(page, 0.0)
        page.on("console", lambda message: shown.complaints.append(message.text))
        page.on("pageerror", lambda error: shown.complaints.append(str(error)))
        page.on("dialog", lambda dialog: shown.complaints.append("a dialog"))
        page.on("request", lambda request: shown.requests.append(request.url))
        start = time.perf_counter()
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            page.evaluate(SETTLED)
        shown.seconds = time.perf_counter() - start
        opened.append(shown)
        return shown

    yield open_page
    for number, shown in enumerate(opened):
        shown.page.context.close()
        assert shown.complaints == []
        assert shown.requests == [(tmp_path / f"{number}.html").as_uri()]


@pytest.fixture(scope="module")
def dry() -> str:
    """Three categories that lie on each other as plainly as can be; tensors of two."""
    count = 100
    timeline = {
        **a_timeline(count),
        "category_bytes": {
            "parameters": [2 * GIB] * count,
            "activations": [GIB] * count,
            "logits": [GIB * (index == 60) for index in range(count)],
        },
        "reserved_bytes": [5 * GIB] * count,
        "peak": {"event": 60, "phase": "forward", "allocated_bytes": 4 * GIB},
        "tensors": [
            tensor(0, None, 2 * GIB, "parameters", line=11, function="build"),
            tensor(10, 80, GIB, line=22, function="attention"),
            tensor(60, 61, GIB, "logits", line=33, function="head"),
        ],
    }
    return findings_report(findings(timeline))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    recovery = {"step": 12, "event": "recovery", "phase": "forward", "before": {"a": 1}, "after": {"a": 2}}
    folder = a_run(tmp_path_factory.mktemp("run") / "run", extra=(recovery,))
    return run_report(folder, plan={"predicted_peak_bytes": 2 * GIB})


@pytest.fixture(scope="module")
def explanations() -> dict[str, str]:
    return {lang: explanation_report(an_explanation(lang=lang)) for lang in LANGUAGES}


def test_the_charts_are_drawn(show: Any, run: str, dry: str) -> None:
    shown = show(run)
    assert shown.page.locator(".uplot").count() == 3
    assert shown.pixels("#loss canvas")["#1f5fbf"] > 100
    assert shown.pixels("#memory canvas")["#9d174d"] > 100, "the prediction"
    shown = show(dry)
    colours = shown.pixels("#timeline canvas")
    assert colours["#332288"] > 10_000
    assert colours["#ddcc77"] > 5000
    assert colours["#882255"] > 10, "a peak of one event"


def test_the_pointer_tells_the_tensor_and_the_line(show: Any, dry: str) -> None:
    shown = show(dry)
    shown.point("timeline", 0.3, 0.9)
    tip = shown.text("#timeline .tip")
    assert "total 3.00 GiB" in tip
    assert "parameters: 2.00 GiB" in tip
    assert "model.py:11 in build" in tip
    shown.point("timeline", 0.3, 1 - 2.5 / HIGHEST)
    assert "activations: 1.00 GiB" in shown.text("#timeline .tip")
    panel = shown.text("#timeline .panel")
    assert "in the category activations" in panel
    for words in (f"64 × {GIB} bfloat16", "aten::mm", "model.py:22 in attention"):
        assert words in panel, words
    shown.point("timeline", 0.605, 1 - 3.5 / HIGHEST)
    assert "model.py:33 in head" in shown.text("#timeline .tip"), "a peak of one event can be met"
    shown.page.mouse.move(0, 0)
    assert shown.page.locator("#timeline .tip").is_hidden()


def test_boxes_filter_categories(show: Any, dry: str) -> None:
    shown = show(dry)
    assert shown.text("#timeline .panel h3") == "event 60, forward: 4.00 GiB"
    box = shown.page.get_by_role("checkbox", name="parameters")
    box.uncheck()
    shown.page.evaluate(SETTLED)
    assert shown.text("#timeline .panel h3") == "event 60, forward: 2.00 GiB"
    assert "model.py:11" not in shown.text("#timeline .panel")
    assert "#332288" not in shown.pixels("#timeline canvas")
    shown.point("timeline", 0.3, 0.97)
    assert "activations: 1.00 GiB" in shown.text("#timeline .tip"), "it is the lowest now"
    box.check()
    shown.page.evaluate(SETTLED)
    assert shown.pixels("#timeline canvas")["#332288"] > 10_000
    for each in shown.page.locator("#timeline .legend input").all():
        each.uncheck()
    assert ": 0 bytes" in shown.text("#timeline .panel h3")


def test_a_curve_can_be_hidden_and_read(show: Any, run: str) -> None:
    shown = show(run)
    before = shown.pixels("#loss canvas")["#c2410c"]
    shown.page.get_by_role("checkbox", name="Validation loss").uncheck()
    shown.page.evaluate(SETTLED)
    assert shown.pixels("#loss canvas").get("#c2410c", 0) < before / 10
    shown.point("loss", 0.5, 0.5)
    tip = shown.text("#loss .tip")
    assert "step 19" in tip
    assert "Training loss (logged steps): 4" in tip
    assert "Validation" not in tip


def test_keys_move_through_a_chart_and_are_told(show: Any, dry: str) -> None:
    shown = show(dry)
    plot = shown.page.locator("#timeline .plot")
    plot.focus()
    told = []
    for key in ("Home", "ArrowRight", "ArrowRight", "End", "ArrowLeft", "PageUp"):
        plot.press(key)
        shown.page.evaluate(SETTLED)
        told.append(shown.page.locator("#timeline [aria-live]").text_content().partition(",")[0])
    assert told == ["event 0", "event 1", "event 2", "event 100", "event 99", "event 94"]
    shown.page.get_by_role("button", name="Peak").click()
    shown.page.evaluate(SETTLED)
    assert shown.text("#timeline .panel h3").startswith("event 60")


def test_dragging_zooms_and_a_button_goes_back(show: Any, dry: str) -> None:
    shown = show(dry)
    button = shown.page.get_by_role("button", name="Whole run")
    assert button.is_hidden()
    shown.point("timeline", 0.2, 0.5)
    shown.page.mouse.down()
    shown.point("timeline", 0.5, 0.5)
    shown.page.mouse.up()
    shown.page.evaluate(SETTLED)
    assert button.is_visible()
    shown.point("timeline", 0.999, 0.9)
    assert "event 49" in shown.text("#timeline .tip") or "event 50" in shown.text("#timeline .tip")
    button.click()
    shown.page.evaluate(SETTLED)
    assert button.is_hidden()
    shown.point("timeline", 0.999, 0.9)
    assert "event 99" in shown.text("#timeline .tip") or "event 100" in shown.text("#timeline .tip")


def test_lines_are_copied_to_the_letter(show: Any, explanations: dict[str, str]) -> None:
    for lang, copied in (("en", "Copied"), ("ja", "コピーしました")):
        shown = show(explanations[lang], permissions=["clipboard-read", "clipboard-write"])
        buttons = shown.page.locator("#fixes button.copy")
        assert buttons.count() == 2
        for index, lines in enumerate(("batch_size = 4\nx = 1", "tightfit train train.py --loss=chunked")):
            buttons.nth(index).click()
            assert shown.page.evaluate("navigator.clipboard.readText()") == lines
            assert buttons.nth(index).inner_text() == copied
            assert shown.page.locator("body > [aria-live]").text_content() == copied


def test_lines_are_copied_where_the_clipboard_is_closed(show: Any, explanations: dict[str, str]) -> None:
    shown = show(explanations["en"])
    shown.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    button = shown.page.locator("#fixes button.copy").first
    button.focus()
    shown.page.keyboard.press("Enter")
    shown.page.evaluate(SETTLED)
    assert shown.page.evaluate("getSelection().toString()") == "batch_size = 4\nx = 1"


def test_the_bars_of_an_explanation(show: Any, explanations: dict[str, str]) -> None:
    shown = show(explanations["en"])
    bars = [each.bounding_box() for each in shown.page.locator("#memory .segment").all()]
    for one, following in itertools.pairwise(bars):
        assert following["x"] == pytest.approx(one["x"] + one["width"], abs=2.5), "at least two pixels each"
    limit = shown.page.locator("#memory .limit").last.bounding_box()["x"]
    assert bars[-1]["x"] < limit < bars[-1]["x"] + bars[-1]["width"]
    colour = "(each) => getComputedStyle(each).backgroundColor"
    assert shown.page.locator("#memory .segment").last.evaluate(colour) == "rgb(176, 0, 32)"
    logits = shown.page.locator("#memory tr", has_text="logits").locator(".segment")
    assert logits.evaluate(colour) == "rgb(136, 34, 85)"
    shown.page.emulate_media(color_scheme="dark")
    assert logits.evaluate(colour) == "rgb(208, 89, 143)"


def test_an_explanation_is_read_aloud(show: Any, explanations: dict[str, str]) -> None:
    page = show(explanations["en"]).page
    assert page.get_by_role("table", name="Fixes compared").get_by_role("row").count() == 5
    assert page.get_by_role("rowheader", name="batch 4 x accumulation 16").count() == 1
    assert page.get_by_role("group", name="batch 4 x accumulation 16").count() == 1
    assert page.locator(".track:not([aria-hidden])").count() == 0
    assert page.get_by_role("heading", level=2).all_inner_texts()[:4] == [
        "Problem", "Memory of the card at the failure", "Cause", "Fixes",
    ]  # fmt: skip


def test_an_explanation_without_scripts(show: Any, explanations: dict[str, str]) -> None:
    shown = show(explanations["en"], java_script_enabled=False)
    assert shown.page.locator("button").count() == 0
    assert shown.page.locator("#fixes pre").first.text_content() == "batch_size = 4\nx = 1"


def test_a_log_runs_nothing(show: Any) -> None:
    shown = show(explanation_report(an_explanation(EVIL_LOG, text="<img src=http://127.0.0.1:9/x onerror=alert(2)>")))
    assert "<script>alert(1)</script>" in shown.text("#problem")
    assert "onerror=alert(2)>" in shown.text("#memory")


def test_an_explanation_on_paper(show: Any, explanations: dict[str, str]) -> None:
    shown = show(explanations["ja"], width=688, color_scheme="dark")  # A4 without its margins
    assert len(shown.page.pdf(format="A4")) > 20_000
    shown.page.emulate_media(media="print")
    assert shown.page.evaluate("document.documentElement.scrollWidth") == 688
    assert shown.page.locator("button.copy").first.is_hidden()
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.skipif(AXE is None, reason="$AXE names no axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(show: Any, run: str, dry: str, explanations: dict[str, str], scheme: str) -> None:
    assert AXE is not None
    pages = [run, dry, *explanations.values(), *(plan_report(a_plan(), lang=lang) for lang in LANGUAGES)]
    for html in pages:
        for width in (360, 1200):
            page = show(html, width=width, color_scheme=scheme).page
            page.evaluate(Path(AXE).read_text(encoding="utf-8"))
            found = page.evaluate("axe.run()")
            assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []


@pytest.mark.slow
def test_a_phone_shows_all_of_it(show: Any, run: str, dry: str, explanations: dict[str, str]) -> None:
    for html in (*explanations.values(), plan_report(a_plan()), plan_report(a_plan(), lang="ja"), run, dry):
        shown = show(html, width=360, has_touch=True, is_mobile=True, device_scale_factor=2)
        assert shown.page.evaluate("document.documentElement.scrollWidth") == 360
        for plot in shown.page.locator(".uplot").all():
            box = plot.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
    over = shown.page.locator("#timeline .u-over")
    over.scroll_into_view_if_needed()
    over.tap(position={"x": 60, "y": 150})
    shown.page.evaluate(SETTLED)
    assert "total 3.00 GiB" in shown.text("#timeline .tip")


def test_turning_a_phone_draws_again(show: Any, run: str) -> None:
    shown = show(run, width=360)
    shown.page.set_viewport_size({"width": 740, "height": 360})
    shown.page.evaluate(SETTLED)
    shown.page.evaluate(SETTLED)
    assert shown.page.locator("#loss .uplot").bounding_box()["width"] > 500


def test_dark_and_back(show: Any, run: str) -> None:
    shown = show(run, color_scheme="dark")
    assert shown.pixels("#loss canvas")["#79a9ff"] > 100
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 18, 21)"
    shown.page.emulate_media(color_scheme="light")
    shown.page.evaluate(SETTLED)
    assert shown.pixels("#loss canvas")["#1f5fbf"] > 100


def test_printed_from_a_dark_screen(show: Any, run: str) -> None:
    shown = show(run, color_scheme="dark")
    shown.page.evaluate("addEventListener('beforeprint', () => { window.printed = true; })")
    assert len(shown.page.pdf(format="A4")) > 20_000
    assert shown.page.evaluate("window.printed")
    shown.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    shown.page.evaluate(SETTLED)
    assert shown.pixels("#loss canvas")["#1f5fbf"] > 100, "on paper the charts are light"
    shown.page.evaluate("dispatchEvent(new Event('afterprint'))")
    shown.page.evaluate(SETTLED)
    assert shown.pixels("#loss canvas")["#79a9ff"] > 100


def test_a_screen_reader_finds_names(show: Any, run: str) -> None:
    shown = show(run)
    page = shown.page
    for role in ("banner", "main", "navigation", "contentinfo"):
        assert page.get_by_role(role).count() == 1, role
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("group", name="Loss. Arrow keys").count() == 1
    assert page.locator("#loss table").count() == 1
    page.locator("#loss details summary").click()
    assert page.get_by_role("table", name="Loss at evenly spaced steps").is_visible()


def test_without_scripts_the_tables_remain(show: Any, run: str) -> None:
    shown = show(run, java_script_enabled=False)
    assert "Charts need JavaScript" in shown.page.content()
    assert shown.page.locator("#loss table").count() == 1


@pytest.mark.slow
def test_the_smallest_inputs(show: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.jsonl").write_text(
        '{"step": 0, "loss": NaN, "val_loss": 3, "tokens_per_s": 0, "memory_bytes": 0}\n'
    )
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "metrics.jsonl").write_text(
        '{"step": 9007199254740991, "loss": -1e300}\n{"step": 0, "loss": 1e300}\n'
    )
    for html in (
        run_report(a_run(tmp_path / "one", steps=1)),
        run_report(tmp_path / "none"),
        run_report(tmp_path / "far"),
    ):
        shown = show(html)
        for name in ("loss", "rate", "memory"):
            if shown.page.locator(f"#{name}").count():
                shown.point(name, 0.5, 0.5)
                shown.page.locator(f"#{name} .plot").press("ArrowRight")
                assert "NaN" not in shown.text(f"#{name} .chart")
                assert "undefined" not in shown.text(f"#{name} .chart")
    for count in (1, 2):
        shown = show(findings_report(findings({**a_timeline(count), "reserved_bytes": None})))
        shown.point("timeline", 0.5, 0.9)
        assert "event" in shown.text("#timeline .tip")


def test_a_failure_in_japanese(show: Any) -> None:
    timeline = {**a_timeline(), "failures": [{"event": 300, "requested_bytes": 6 * GIB, "free_bytes": GIB}]}
    shown = show(findings_report(findings(timeline, outcome="out_of_memory", failure=FAILURE), lang="ja"))
    assert "299 番目、順伝播" in shown.text("#timeline .panel h3")
    shown.page.get_by_role("button", name="失敗した時点").click()
    assert shown.pixels("#timeline canvas")["#b00020"] > 50


def test_hostile_text_stays_text(show: Any, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>"
    tensors = [tensor(0, None, MIB, function=evil, operator=evil, dtype=evil)]
    shown = show(findings_report(findings({**a_timeline(), "tensors": tensors}, notes=[evil])))
    shown.point("timeline", 0.5, 0.02)
    assert evil in shown.text("#timeline .panel")


@pytest.mark.slow
def test_huge_inputs_open_at_once(show: Any, tmp_path: Path) -> None:
    count = 2_000  # as many moments as a dry run keeps
    timeline = a_timeline(count)
    timeline["category_bytes"]["logits"][1_308] += 40 * GIB
    timeline["peak"] = {"event": 1_308, "phase": "forward", "allocated_bytes": 0}
    sizes = np.random.default_rng(2).integers(1, 64 * MIB, count // 2).tolist()
    names = ("parameters", "activations", "logits")
    timeline["tensors"] = [
        tensor(2 * index, min(count, 2 * index + 40), size, names[index % 3], line=index % 500)
        for index, size in enumerate(sizes)
    ]
    start = time.perf_counter()
    html = run_report(a_run(tmp_path / "run", steps=100_000), findings=findings(timeline))
    made = time.perf_counter() - start
    assert len(html.encode()) < 10_000_000
    shown = show(html)
    print(f"{len(html.encode()) / 1e6:.2f} MB, made in {made:.1f} s, drawn after {shown.seconds:.2f} s")
    assert shown.seconds < SECONDS
    assert shown.text("#timeline .panel h3").startswith("event 1,308")
    assert "GiB" in shown.text("#timeline .panel h3")
    shown.point("timeline", 0.65433, 0.98)
    assert "event 1,308" in shown.text("#timeline .tip")
    assert "model.py" in shown.text("#timeline .panel")
