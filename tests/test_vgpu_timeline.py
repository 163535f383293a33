"""The picture of memory over a dry run: decimation keeps what matters, and both formats can be drawn from JSON."""

import random
import subprocess
import sys
import warnings
from collections import defaultdict
from itertools import pairwise
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import torch

from tightfit.allocator.caching import CachingAllocator, OutOfMemory
from tightfit.errors import ConfigError, DataError
from tightfit.report.timeline_picture import (
    CATEGORY_COLOURS,
    DARK_CATEGORY_COLOURS,
    PHASE_COLOURS,
    timeline_picture,
)
from tightfit.units import GIB, MIB
from tightfit.vgpu.recorder import Allocation, Recorder
from tightfit.vgpu.records import CATEGORIES, FailedRequest, Phase, Timeline
from tightfit.vgpu.snapshot import TraceLog
from tightfit.vgpu.timeline import MAX_POINTS, timeline_of


def make(total=8 * GIB, *, log=True, **kwargs) -> Recorder:
    recorder = Recorder(CachingAllocator(total_bytes=total, **kwargs))
    if log:
        TraceLog.attach(recorder)
    return recorder


def take(recorder: Recorder, nbytes: int, category="activations", phase="forward") -> Allocation:
    allocation = Allocation(
        number=0, nbytes=nbytes, operator="aten::mm", shape=(), dtype="", phase=phase, category=category, frames=()
    )
    recorder.take(allocation)
    return allocation


def train(recorder: Recorder, layers: int = 40, size: int = 20 * MIB) -> None:
    """Two steps of a model: parameters, activations that grow and shrink, gradients, optimizer state."""
    for _ in range(layers):
        take(recorder, size // 4, "parameters", "setup")
    for step in range(2):
        batch = take(recorder, MIB, "inputs")
        kept = [take(recorder, size) for _ in range(layers)]
        logits = [take(recorder, 15 * size, "logits", "loss") for _ in range(2)]
        gradients = []
        for activation in (*reversed(logits), *reversed(kept)):
            if activation in kept:
                gradients.append(take(recorder, size // 4, "gradients", "backward"))
            recorder.give(take(recorder, size // 2, "workspace", "backward"))
            recorder.give(activation)
        recorder.give(batch)
        if not step:
            for _ in range(2 * layers):
                take(recorder, size // 4, "optimizer state", "optimizer")
        for gradient in gradients:
            recorder.give(gradient)


def sums(data: Timeline) -> list[int]:
    return [sum(column) for column in zip(*data.category_bytes.values(), strict=True)]


def all_sums(recorder: Recorder) -> list[int]:
    """The plain sums after every event, without decimation."""
    rounded, total, found = recorder.allocator.settings.round_size, 0, []
    for number in recorder.events:
        size = rounded(recorder.allocations[abs(number) - 1].nbytes)
        total += size if number > 0 else -size
        found.append(total)
    return found


def test_every_category_and_phase_has_a_colour_of_its_own():
    assert CATEGORY_COLOURS.keys() == set(CATEGORIES)
    assert len(set(CATEGORY_COLOURS.values())) == len(CATEGORIES)
    assert PHASE_COLOURS.keys() == set(Phase.__args__)


def test_a_short_run_is_kept_whole_and_adds_up():
    recorder = make(context_bytes=300 * MIB, used_by_others=GIB)
    train(recorder)
    data = timeline_of(recorder)
    assert data.events == list(range(len(recorder.events)))
    assert sums(data) == all_sums(recorder)
    assert max(sums(data)) == data.peak.allocated_bytes == recorder.allocator.peak_allocated_bytes
    assert max(data.reserved_bytes) == recorder.allocator.peak_reserved_bytes
    assert all(r >= s for r, s in zip(data.reserved_bytes, sums(data), strict=True))
    assert sums(data)[data.peak.event] == max(sums(data))
    assert list(data.category_bytes) == [
        "parameters", "gradients", "optimizer state", "activations", "logits", "inputs", "workspace",
    ]  # fmt: skip
    assert data.category_bytes["parameters"][-1] == 40 * 5 * MIB
    assert (data.total_bytes, data.used_by_others_bytes, data.context_bytes) == (8 * GIB, GIB, 300 * MIB)
    assert data.failures == []


@pytest.mark.parametrize("seed", range(5))
def test_decimation_keeps_the_maxima(seed):
    recorder = make(64 * GIB)
    dice = random.Random(seed)
    held = []
    for _ in range(dice.choice((1500, 2100, 20_000))):
        if held and dice.random() < 0.5:
            recorder.give(held.pop(dice.randrange(len(held))))
        else:
            held.append(take(recorder, dice.randrange(1, 4 * MIB), dice.choice(CATEGORIES)))
    data, every = timeline_of(recorder), all_sums(recorder)
    assert len(data.events) <= MAX_POINTS + 2
    assert sums(data) == [every[event] for event in data.events]
    assert max(sums(data)) == max(every)
    assert min(sums(data)) == min(every)
    stretches = np.array_split(np.array(every), 50)
    ends = np.cumsum([0, *map(len, stretches)])
    coarse = 2 * (len(every) // MAX_POINTS + 1)
    for begin, end in pairwise(ends):
        near = [s for e, s in zip(data.events, sums(data), strict=True) if begin - coarse <= e < end + coarse]
        assert max(near) >= max(every[begin:end]), "no stretch loses its maximum"
    assert max(data.reserved_bytes) == recorder.allocator.peak_reserved_bytes
    assert data.events[-1] == len(every) - 1


def test_the_largest_tensors_of_each_moment_are_named():
    recorder = make()
    small = take(recorder, MIB)
    large = [take(recorder, size * MIB) for size in (5, 4, 3)]
    recorder.give(large[0])
    recorder.give(small)
    tensors = {each.bytes // MIB: each for each in timeline_of(recorder).tensors}
    # Three at a time: the small one was among them before the others came, and the large one until it went.
    assert {size: (each.from_event, each.to_event) for size, each in tensors.items()} == {
        1: (0, 5),
        5: (1, 4),
        4: (2, None),
        3: (3, None),
    }
    assert all(each.operator == "aten::mm" and each.category == "activations" for each in tensors.values())


def test_reserved_keeps_its_maximum_though_it_is_given_back_at_once():
    recorder = make()
    for _ in range(9000):
        recorder.give(take(recorder, 512))
    recorder.give(take(recorder, 300 * MIB))
    recorder.allocator.empty_cache()
    for _ in range(9000):
        recorder.give(take(recorder, 512))
    assert max(timeline_of(recorder).reserved_bytes) == 302 * MIB


def test_a_block_that_is_passed_on_is_counted_once():
    recorder = make()

    def describe(nbytes):
        return Allocation(0, nbytes, "aten::add", (), "float32", "backward", "gradients", ())

    first, total = torch.empty(MIB), torch.empty(MIB)
    recorder.track(first, describe)
    recorder.track_accumulation(total, first, describe)
    del first
    assert len(recorder.events) == 3
    data = timeline_of(recorder)
    assert data.category_bytes == {"gradients": [4 * MIB] * 3}
    assert max(sums(data)) == recorder.peak_allocated


def test_phases_begin_where_they_do_and_short_ones_are_left_out():
    recorder = make()
    train(recorder)
    phases = [each.phase for each in timeline_of(recorder).phases]
    assert phases == ["setup", "forward", "loss", "backward", "optimizer", "forward", "loss", "backward"]
    for _ in range(1000):
        take(recorder, 512, phase="eval")
        take(recorder, 512, phase="sample")
    assert len(timeline_of(recorder).phases) <= 401


def test_a_failure_is_in_the_data():
    recorder = make(GIB, context_bytes=100 * MIB)
    take(recorder, 500 * MIB)
    with pytest.raises(OutOfMemory):
        take(recorder, 600 * MIB)
    (failure,) = timeline_of(recorder).failures
    assert failure == FailedRequest(event=1, requested_bytes=600 * MIB, free_bytes=424 * MIB)


def test_without_a_log_there_is_no_reserved_line_and_no_failure(tmp_path):
    recorder = make(log=False)
    train(recorder)
    data = timeline_of(recorder)
    assert data.reserved_bytes is None
    assert max(sums(data)) == recorder.peak_allocated
    timeline_picture(timeline_of(recorder), tmp_path / "run.png")


# Pictures


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def text_of(data: Timeline, card: str = "", outcome: str = "", place: str = "") -> str:
    """All words of a picture, from the figure itself: a file has them as curves."""
    from matplotlib.text import Text

    from tightfit.report.timeline_picture import _figure

    return "\n".join(each.get_text() for each in _figure(data, card, outcome, place=place).findobj(Text))


def share(image: np.ndarray, colour: str) -> float:
    wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    return float((abs(image - wanted).max(axis=2) <= 2).mean())


@pytest.fixture(scope="module")
def data() -> Timeline:
    recorder = make(4 * GIB, context_bytes=300 * MIB)
    train(recorder)
    return timeline_of(recorder)


def test_png_has_the_colours_of_what_is_in_memory(data, tmp_path):
    path = tmp_path / "run.png"
    timeline_picture(data, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = pixels(path)
    assert image.shape == (902, 1660, 3)
    for category in ("parameters", "optimizer state", "gradients", "activations", "logits"):
        assert share(image, CATEGORY_COLOURS[category]) > 0.001, category
    assert share(image, CATEGORY_COLOURS["cast copies"]) == 0, "there are none"
    assert share(image, PHASE_COLOURS["forward"]) > 0.001


def test_a_dark_picture_has_a_dark_page(data, tmp_path):
    timeline_picture(data, tmp_path / "light.png")
    timeline_picture(data, tmp_path / "dark.png", dark=True)
    light, dark = pixels(tmp_path / "light.png"), pixels(tmp_path / "dark.png")
    assert light.mean() > 150 > 90 > dark.mean()
    assert share(dark, "#FFFFFF") == 0
    assert share(dark, DARK_CATEGORY_COLOURS["logits"]) > 0.001


def test_svg_is_valid_and_has_no_date(data, tmp_path):
    timeline_picture(data, tmp_path / "run.svg")
    root = ElementTree.parse(tmp_path / "run.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    kinds = defaultdict(int)
    for element in root.iter():
        kinds[element.tag.partition("}")[2]] += 1
    assert kinds["path"] > 50
    text = (tmp_path / "run.svg").read_text().lower()
    assert CATEGORY_COLOURS["logits"].lower() in text
    assert "<dc:date>" not in text


def test_words_of_a_run_that_fits(data):
    text = text_of(data, "GeForce RTX 3060 12GB", "fits")
    peak = data.peak.allocated_bytes / GIB
    assert f"peak, in backward: {peak:.2f} GiB allocated" in text
    assert "Allocated memory on GeForce RTX 3060 12GB: fits" in text
    assert "3.71 GiB for PyTorch, of 4.00 GiB" in text
    for words in (
        "GiB",
        "setup",
        "forward",
        "backward",
        "parameters   200.00 MiB",
        "reserved by PyTorch",
        "at the peak",
    ):
        assert words in text


def test_words_of_a_failure():
    recorder = make(GIB, context_bytes=100 * MIB, used_by_others=100 * MIB)
    take(recorder, 500 * MIB, "logits")
    with pytest.raises(OutOfMemory):
        take(recorder, 600 * MIB)
    data = timeline_of(recorder)
    text = text_of(data, outcome="out_of_memory")
    assert "out of memory: asked for 600.00 MiB,\n324.00 MiB free on the device" in text
    assert "logits   500.00 MiB" in text
    assert "does not fit" in text
    assert "free on the device\nat model.py:186" in text_of(data, outcome="out_of_memory", place="model.py:186")
    assert "824.00 MiB for PyTorch, of 1.00 GiB (100.00 MiB used by others)" in text
    assert "peak, in" in text_of(data, outcome="fits"), "the script caught it"


def test_a_far_capacity_is_written_rather_than_drawn(data):
    assert "of 80.00 GiB, above this picture" in text_of(msgspec.structs.replace(data, total_bytes=80 * GIB))


@pytest.mark.parametrize("log", [True, False])
def test_an_empty_run_can_be_drawn(log, tmp_path):
    timeline_picture(timeline_of(make(log=log)), tmp_path / "empty.png")
    assert pixels(tmp_path / "empty.png").std() > 1


def test_a_first_request_that_fails_can_be_drawn(tmp_path):
    recorder = make(GIB)
    with pytest.raises(OutOfMemory):
        take(recorder, 2 * GIB)
    timeline_picture(timeline_of(recorder), tmp_path / "first.svg")
    assert "out of memory" in text_of(timeline_of(recorder))


def test_other_endings_and_folders(data, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.jpg' must end in \.png or \.svg"):
        timeline_picture(data, tmp_path / "run.jpg")
    with pytest.raises(DataError, match=r"cannot write the picture .*No such file"):
        timeline_picture(data, tmp_path / "absent" / "run.png")


def test_drawing_needs_neither_torch_nor_pyplot(data, tmp_path):
    (tmp_path / "found.json").write_bytes(msgspec.json.encode(data))
    script = (
        "import sys, msgspec; from tightfit.report.timeline_picture import timeline_picture;"
        "from tightfit.vgpu.records import Timeline;"
        "assert 'matplotlib' not in sys.modules;"
        f"found = msgspec.json.decode(open({str(tmp_path / 'found.json')!r}).read(), type=Timeline);"
        f"timeline_picture(found, {str(tmp_path / 'out.png')!r});"
        "assert not {'torch', 'matplotlib.pyplot'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "out.png").stat().st_size > 20_000


def test_nothing_warns(data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timeline_picture(data, tmp_path / "run.png")
