"""Changes to scripts: each edit of a text, and the search that plays them."""

import subprocess
from pathlib import Path

import pytest
from plays import simulator

from tightfit.config.knob import Variant
from tightfit.questions.asking import Asked
from tightfit.questions.edits import KINDS
from tightfit.questions.suggest import Workshop, suggest
from tightfit.units import MIB
from tightfit.vgpu.records import Settings

LOOP = """\
import torch
from torch import nn
from torch.optim import AdamW
class Net(nn.Module):
    def forward(self, x, mask):
        for number, block in enumerate(self.blocks):
            x = block(x, mask=mask)
        return x
def validate(model, loader):
    for x, y in loader:
        out = model(x)
        total += loss_of(out, y)
    return total
optimizer = AdamW(model.parameters(), lr=1e-3)
for x, y in loader:
    out = model(x)
    loss = loss_of(out, y)
    optimizer.zero_grad()  # now
    loss.backward()
    optimizer.step()
    losses.append(loss)
"""


def lines_of(code: str, text: str = LOOP) -> tuple[set[str], set[str]]:
    """The lines that a kind of change takes away from a text and those that it adds."""
    (kind,) = [each for each in KINDS if each.code == code]
    after = kind.apply(text)
    if after is None:
        return set(), set()
    old, new = text.splitlines(), after.splitlines()
    return set(old) - set(new), set(new) - set(old)


@pytest.mark.parametrize(
    ("code", "gone", "new"),
    [
        ("no_grad", set(), {"@torch.no_grad()"}),
        ("detach", {"    losses.append(loss)"}, {"    losses.append(loss.detach())"}),
        ("delete", set(), {"        del out", "    del out"}),
        (
            "fused",
            {"optimizer = AdamW(model.parameters(), lr=1e-3)"},
            {"optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)"},
        ),
        (
            "checkpoint",
            {"            x = block(x, mask=mask)"},
            {
                "            x = torch.utils.checkpoint.checkpoint(block, x, mask=mask, use_reentrant=False)",
                "import torch.utils.checkpoint",
            },
        ),
        (
            "autocast",
            {"    out = model(x)", "    loss = loss_of(out, y)"},
            {
                "    with torch.autocast('cuda', dtype=torch.bfloat16):",
                "        loss = loss_of(out, y)",
            },
        ),
        ("model_checkpoint", set(), set()),
    ],
)
def test_a_change_touches_its_lines_only(code: str, gone: set[str], new: set[str]) -> None:
    assert lines_of(code) == (gone, new)


def test_gradients_are_cleared_before_the_pass_with_their_comment() -> None:
    (kind,) = [each for each in KINDS if each.code == "zero_grad_first"]
    loop = (kind.apply(LOOP) or "").splitlines()[14:]
    assert loop[1:3] == ["    optimizer.zero_grad()  # now", "    out = model(x)"]
    assert len(loop) == 7


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("delete", "for x in loader:\n    out = model(x)\n    out.backward()\nprint(out)\n"),
        ("delete", "for x in loader:\n    keep(out)\n    out = model(x)\n    out.backward()\n"),
        ("delete", "for x in loader: out = model(x); out.backward()\n"),
        ("detach", "for x in loader:\n    total += loss\ntotal.backward()\n"),
        ("detach", "for x in loader:\n    loss = model(x).item()\n    total += loss\n"),
        ("no_grad", "def evaluate(model, x):\n    model.eval()\n    model(x).backward()\n"),
        ("no_grad", "@torch.inference_mode()\ndef evaluate(model, x):\n    return model(x)\n"),
        ("checkpoint", "class A:\n    def forward(self, x):\n        for each in x:\n            x = each(x)\n"),
        ("fused", "import torch\no = torch.optim.AdamW(p, foreach=True)\n"),
        ("fused", "o = Adam(p)\n"),
        (
            "autocast",
            "with torch.autocast('cuda'):\n    for x in loader:\n        l = model(x)\n        l.backward()\n",
        ),
        ("fused", "print 'Python 2'\n"),
    ],
)
def test_what_would_change_the_meaning_is_left_alone(code: str, text: str) -> None:
    assert lines_of(code, text) == (set(), set())


@pytest.mark.parametrize(
    ("call", "after"),
    [
        ("Adam(p)", "Adam(p, fused=True)"),
        ("Adam(p, lr=(1e-3))", "Adam(p, lr=(1e-3), fused=True)"),
        ("Adam(p, lr=1,)", "Adam(p, lr=1, fused=True)"),
        ("Adam(p,  # all, of them\n lr=1,  # slow\n)", "Adam(p,  # all, of them\n lr=1,  # slow\nfused=True)"),
        ("Adam(p, lr=1  # slow, or not\n)", "Adam(p, lr=1  # slow, or not\n, fused=True)"),
        ("Adam(each for each in p)", None),
    ],
)
def test_an_argument_is_added_behind_the_last(call: str, after: str | None) -> None:
    (kind,) = [each for each in KINDS if each.code == "fused"]
    text = "from torch.optim import Adam\no = "
    assert kind.apply(f"{text}{call}\n") == (after and f"{text}{after}\n")


def test_line_ends_tabs_and_texts_of_several_lines_stay() -> None:
    (kind,) = [each for each in KINDS if each.code == "autocast"]
    text = 'import torch\r\nfor x in loader:\r\n\tloss = model(x, """a\r\nb""")\r\n\tloss.backward()'
    header = "\twith torch.autocast('cuda', dtype=torch.bfloat16):"
    lines = ["import torch", "for x in loader:", header, '\t\tloss = model(x, """a', 'b""")', "\tloss.backward()"]
    assert kind.apply(text) == "\r\n".join(lines)


TRAIN = """\
import argparse, torch
from torch import nn
parser = argparse.ArgumentParser()
parser.add_argument("--batch_size", type=int, default=16)
parser.add_argument("--accumulation", type=int, default=1)
args = parser.parse_args()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(6)
        )
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
model = Net().cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(4):
    for _ in range(args.accumulation):
        out = model(torch.randn(args.batch_size, 512, 512, device="cuda"))
        (out.square().mean() / args.accumulation).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(memory: int) -> Asked:
    return Asked.of(simulator(), Settings(gpu="RTX 3060 12GB", memory_bytes=memory), ["train.py"])


class TestSearch:
    def test_what_is_suggested_fits_when_it_is_done(self, folder: Path) -> None:
        found = suggest(asked(640 * MIB))
        assert not found.fits
        by_change = {tuple(each.changes): each for each in found.suggestions}
        batch, blocks = by_change["batch",], by_change["checkpoint",]
        assert batch.values["batch_size"] * batch.values["accumulation"] == 16
        assert batch.command[1:] == [f"--{name}={value}" for name, value in batch.values.items()]
        assert blocks.costs_time
        assert blocks.is_exact
        assert (folder / "train.py").read_text() == TRAIN, "a file that was there stays as it is"
        again = suggest(asked(640 * MIB))
        assert (again.suggestions, again.tried, again.plays) == (found.suggestions, found.tried, 0)
        subprocess.run(["patch", "-p0"], input=blocks.diff, text=True, check=True, capture_output=True)
        patched = asked(640 * MIB)
        (detail,) = patched.play([patched.request()])
        assert (detail.findings.outcome, detail.findings.needed_bytes) == ("fits", blocks.device_bytes)

    @pytest.mark.slow
    def test_of_changes_together_only_those_are_kept_that_are_needed(self, folder: Path) -> None:
        larger = (
            TRAIN.replace("batch_size", "rows").replace("512, 2048", "1024, 4096").replace("2048, 512", "4096, 1024")
        )
        larger = larger.replace("default=16", "default=4").replace("512, 512", "512, 1024").replace("SGD", "AdamW")
        (folder / "train.py").write_text(larger)
        found = suggest(asked(1000 * MIB))
        assert {"checkpoint", "delete", "fused"} < {name for each in found.tried for name in each.changes}
        assert [each.changes for each in found.suggestions] == [["fused", "checkpoint"]]
        assert "del out" not in found.suggestions[0].diff

    def test_a_script_that_fails_after_it_ran_out_of_memory_does_not_fit(self, folder: Path) -> None:
        caught = (
            "try:\n    torch.ones(args.batch_size * 10**8, device='cuda')\nexcept torch.OutOfMemoryError:\n    {}\n"
        )
        (folder / "train.py").write_text(TRAIN.split("class Net")[0] + caught.format("raise ValueError('no plan')"))
        found = suggest(asked(2000 * MIB))
        assert not found.fits
        assert [each.values for each in found.suggestions] == [{"batch_size": 4, "accumulation": 4}]
        assert {each.outcome for each in found.tried} == {"out_of_memory"}


class TestWorkshop:
    def test_a_program_of_training_arguments_gets_its_options(self, tmp_path: Path) -> None:
        script = tmp_path / "run.py"
        script.write_text(
            "from transformers import AutoModel, HfArgumentParser, TrainingArguments\n"
            "model = AutoModel.from_pretrained('x')\n"
        )
        (kind,) = [each for each in KINDS if each.code == "model_checkpoint"]
        changed = Workshop(Variant(("run.py", "--bf16"), {}), [str(script)]).changed([kind]).variant
        assert changed.words == ("run.py", "--bf16", "--gradient_checkpointing=True")
        assert not changed.replaced
        given = Workshop(Variant(("run.py", "--gradient_checkpointing"), {}), [str(script)])
        assert kind not in given.kinds

    @pytest.mark.parametrize(
        ("text", "words", "environ"),
        [
            ("os.environ.get('BATCH_SIZE', 32)", ["train.py"], {"BATCH_SIZE": "16"}),
            ("import argparse\np.add_argument('--train-bs', default=32)", ["train.py", "--train-bs=16"], {}),
            ("yaml", ["train.py", "-b", "16"], {}),
        ],
    )
    def test_the_batch_is_found_where_the_script_reads_it(
        self, text: str, words: list[str], environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "train.py").write_text(text)
        given = ("train.py", "-b", "32") if "-b" in words else ("train.py",)
        change = next(Workshop(Variant(given, {}), [str(tmp_path / "train.py")]).smaller())
        assert (list(change.variant.words), change.variant.environ) == (words, environ)

    def test_a_scripts_own_switch_is_used(self, tmp_path: Path) -> None:
        script = tmp_path / "train.py"
        script.write_text(
            "group.add_argument('--grad-checkpointing', action='store_true', default=False, help='(less memory)')\n"
        )
        (kind,) = [each for each in KINDS if each.code == "model_checkpoint"]
        changed = Workshop(Variant(("train.py", "-b", "8"), {}), [str(script)]).changed([kind]).variant
        assert changed.words == ("train.py", "-b", "8", "--grad-checkpointing")
        script.write_text("parser.add_argument('--amp', action='store_true', help='Use mixed precision')\n")
        (kind,) = [each for each in KINDS if each.code == "amp"]
        changed = Workshop(Variant(("train.py",), {}), [str(script)]).changed([kind]).variant
        assert changed.words == ("train.py", "--amp")

    def test_a_script_that_was_named_from_its_folder_is_one_file(self, folder: Path) -> None:
        (detail,) = asked(10**9).play([asked(10**9).request()])
        assert [each.path for each in detail.files if each.path.endswith("train.py")] == [str(folder / "train.py")]
