# ruff: noqa: E501 - messages and tracebacks stand here as they are printed
"""An explanation from end to end: the tensor, the causes, the fixes with their verdicts, in two languages."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from test_oomlog import NANOGPT, STORY

from tightfit.cli.main import main
from tightfit.config import TrainConfig, read_config
from tightfit.diagnosis.cause_records import OtherProcesses, OutsidePyTorch
from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.named_card import card_of
from tightfit.diagnosis.plays import Plays
from tightfit.diagnosis.remedies import VERDICTS
from tightfit.diagnosis.render import render
from tightfit.errors import ConfigError, DeviceError
from tightfit.oomlog.log_reader import read_log
from tightfit.oomlog.printed import Printed
from tightfit.units import GIB, MIB
from tightfit.wording.diagnosis import words

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "train_openwebtext.py"
SURROUNDED = f"""/home/me/nanoGPT/train.py:196: FutureWarning: `torch.cuda.amp.GradScaler(args...)` is deprecated. Please use `torch.amp.GradScaler('cuda', args...)` instead.
  scaler = torch.cuda.amp.GradScaler(enabled=(dtype == 'float16'))
[0/0] Not enough SMs to use max_autotune_gemm mode
Traceback (most recent call last):
  File "/home/me/nanoGPT/train.py", line 264, in <module>
    losses = estimate_loss()
  File "/home/me/nanoGPT/train.py", line 224, in estimate_loss
    logits, loss = model(X, Y)
  File "/home/me/nanoGPT/model.py", line 184, in forward
    logits = self.lm_head(x)
{STORY}
"""
KEYS = (
    "status", "kind", "torch_format", "requested_bytes", "device_index", "total_bytes", "free_bytes", "process_bytes",
    "allocated_bytes", "unallocated_bytes", "reserved_bytes", "private_pool_bytes", "allowed_bytes", "others_bytes",
    "outside_pytorch_bytes", "other_processes", "rank", "phase", "frames", "culprit", "causes", "remedies",
)  # fmt: skip
SMALL = {"n_layer": 1, "n_head": 1, "n_embd": 64, "vocab_size": 50304, "dtype": "bfloat16", "batch_size": 64,
         "gradient_accumulation_steps": 1}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def english(own_cache: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANG", "C")
        yield


def by_code(found: Explanation) -> dict:
    return {each.code: each for each in found.remedies}


# The story


@pytest.fixture(scope="module")
def story() -> Explanation:
    return explain(SURROUNDED, config=read_config(TrainConfig, [str(CONFIG)]).config, config_names=["owt.py"])


@pytest.mark.slow
def test_the_story_in_time():
    """Under 30 s on two idle cores; a busy machine is given more."""
    words_given = [sys.executable, "-m", "tightfit", "explain", "--config", str(CONFIG), "--lang=en"]
    done = subprocess.run(words_given, input=SURROUNDED, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0
    assert "batch 4 x accumulation 16: FITS" in done.stdout


@pytest.mark.slow
def test_the_story_names_its_tensor(story: Explanation):
    culprit = story.culprit
    assert culprit is not None
    assert (culprit.label, culprit.tensor, culprit.shape, culprit.dtype) == (
        "simulated", "logits", (65536, 50304), "bfloat16",
    )  # fmt: skip
    assert (culprit.phase, culprit.iteration, culprit.copies) == ("eval", 2, 2)
    assert culprit.from_before
    assert culprit.matches
    assert (culprit.file, culprit.line) == ("/home/me/nanoGPT/model.py", 184)
    compared = {each.what: each for each in culprit.compared}
    assert compared["requested"].agrees
    assert compared["allocated"].agrees
    assert not compared["cache"].agrees, "both are shown where they differ"
    assert "optimizer state" not in culprit.categories


@pytest.mark.slow
def test_the_story_has_its_causes(story: Explanation):
    causes = {each.code: each for each in story.causes}
    assert next(iter(causes)) == "logits_still_bound"
    others, outside = causes["others_too"], causes["outside"]
    assert isinstance(others, OtherProcesses)
    assert others.others_bytes == 2115271394
    assert others.need_bytes / GIB == pytest.approx(13.18, abs=0.01)
    assert isinstance(outside, OutsidePyTorch)
    assert outside.low_bytes < 40 * MIB < outside.high_bytes
    assert causes["training_too"].label == "simulated"
    assert causes["cache_little"].label == "measured"
    assert {"full_logits", "before_first_step", "hint_few_sms"} <= set(causes)


@pytest.mark.slow
def test_the_story_judges_all_that_people_advise(story: Explanation):
    verdicts = {code: each.verdict for code, each in by_code(story).items()}
    assert verdicts == {
        "split": "fits",
        "chunked_and_checkpointing": "fits",
        "cpu_run": "fits_slowly",
        "chunked_loss": "does_not_fit",
        "checkpointing": "does_not_fit",
        "shorter_block": "does_not_fit",
        "release_logits": "does_not_fit",
        "eval_micro_batch": "does_not_fit",
        "eval_cpu": "does_not_fit",
        "compile_off": "does_not_fit",
        "reduce_overhead": "does_not_fit",
        "expandable_segments": "does_not_fit",
        "close_others": "does_not_fit",
        "eval_iters": "no_effect",
        "empty_cache": "no_effect",
        "other_dtype": "no_effect",
        "grad_scaler": "not_memory",
    }
    best = story.best
    assert best is not None
    assert (best.code, best.exact) == ("split", True)
    assert best.paste == ("batch_size = 4", "gradient_accumulation_steps = 16")
    assert best.device_bytes is not None
    assert 4 * GIB < best.device_bytes < 6.5 * GIB
    assert best.slowdown == pytest.approx(0, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("verbose", [False, True])
def test_the_story_is_told(story: Explanation, language: str, verbose: bool):
    text = render(story, words(language), verbose, width=90)
    titles = {"en": ("Problem", "Cause", "Fixes", "Expected result"),
              "ja": ("問題分析", "根本原因", "推奨修正", "期待される結果")}[language]  # fmt: skip
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    for figure in ("6.14 GiB", "12.28 GiB", "1.97 GiB", "13.18 GiB", "224.90 MiB", "(65536, 50304)", "batch_size = 4"):
        assert figure in " ".join(text.split()), figure
    assert "{" not in text
    assert "?" not in re.sub(r"\n  \? ", "", text)
    assert ("1.96 GiB" in text) == verbose, "the rounding is arithmetic"


# The same with a model that is played in a second


@pytest.fixture(scope="module")
def narrow() -> Explanation:
    """The story's logits with nearly nothing else, without torch.compile."""
    return explain(SURROUNDED, config=TrainConfig(**SMALL, compile=False))


@pytest.mark.slow
def test_a_play_that_differs_shows_both(narrow: Explanation):
    culprit = narrow.culprit
    assert culprit is not None
    assert (culprit.shape, culprit.phase, culprit.iteration) == ((65536, 50304), "eval", 1)
    assert not culprit.from_before, "uncompiled, the loss needs a second tensor in the first iteration"
    assert {each.what for each in culprit.disagreements} >= {"free"}
    assert "The simulation differs from the log in" in render(narrow, words("en"))


def test_every_remedy_has_a_verdict_and_fits_come_first(narrow: Explanation):
    assert len(narrow.remedies) >= 15
    verdicts = [each.verdict for each in narrow.remedies]
    assert verdicts == sorted(verdicts, key=VERDICTS.index)
    found = by_code(narrow)
    assert found["split"].verdict == "fits"
    assert found["split"].saved_bytes is not None
    assert found["split"].saved_bytes > 6 * GIB
    assert found["compile_off"].verdict == "no_effect"
    assert found["other_dtype"].reason == "same_size"
    assert found["release_logits"].reason == "first_iteration"


def test_json_has_the_agreed_keys_and_exact_figures(narrow: Explanation):
    found = json.loads(msgspec.json.encode(narrow.to_json()))
    assert tuple(found) == KEYS
    assert found["requested_bytes"] == 6592774799
    assert found["others_bytes"] == 2115271394
    assert found["private_pool_bytes"] is None
    assert found["frames"][-1] == {
        "file": "/home/me/nanoGPT/model.py", "line": 184, "function": "forward", "source": "logits = self.lm_head(x)",
    }  # fmt: skip
    assert found["phase"] == "eval"
    assert all(
        each["label"] in ("measured", "simulated", "likely", "computed") for each in found["causes"] + found["remedies"]
    )
    assert all(each["sentence"] and each["verdict"] in VERDICTS for each in found["remedies"])


@pytest.mark.slow
def test_a_step_that_fails_is_no_matter_of_the_evaluation():
    deep = {"n_layer": 7, "n_head": 12, "n_embd": 768, "vocab_size": 512, "dtype": "bfloat16", "batch_size": 64}
    message = STORY.replace("6.14 GiB", "192.00 MiB").replace("2.68 GiB is free", "100.00 MiB is free")
    found = explain(message, config=TrainConfig(**deep, gradient_accumulation_steps=1, compile=False))
    assert found.culprit is not None
    assert (found.culprit.label, found.culprit.phase, found.culprit.step) == ("simulated", "forward", 1)
    remedies = by_code(found)
    assert remedies["release_logits"].reason == "not_in_evaluation"
    assert (remedies["checkpointing"].label, remedies["checkpointing"].verdict) == ("simulated", "fits")
    assert remedies["chunked_loss"].verdict == "does_not_fit"
    assert {"held", "others_too"} & {each.code for each in found.causes}


@pytest.mark.slow
def test_a_configuration_that_fits_is_said_to():
    found = explain(STORY, config=TrainConfig(**(SMALL | {"batch_size": 1}), compile=False))
    assert found.causes[0].code == "play_fits"
    assert found.culprit is None
    assert found.best is None
    text = " ".join(render(found, words("en")).split())
    assert "Give the configuration of the run that failed" in text
    assert "None of these fixes" not in text


# Without a configuration


def requesting(size: str) -> str:
    return STORY.replace("6.14 GiB", size).replace("2.68 GiB is free", "20.00 MiB is free")


ASKED_FOR = {
    "en": ("The log alone does not tell which tensor", ("--config FILE", "tightfit dryrun")),
    "ja": ("ログだけでは特定できません", ("--config ファイル", "tightfit dryrun")),
}


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("size", ["782.00 MiB", "6.14 GiB", "418.00 MiB"])
def test_a_size_alone_names_no_tensor(language: str, size: str, capsys, tmp_path: Path):
    log, page = tmp_path / "oom.log", tmp_path / "explanation.html"
    log.write_text(requesting(size))
    command = ["explain", str(log), f"--lang={language}", "--verbose"]
    assert main([*command, "--html", str(page)]) == 0
    terminal = " ".join(capsys.readouterr().out.split())
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    html = page.read_text(encoding="utf-8")
    not_told, to_give = ASKED_FOR[language]
    sentence = next(each["sentence"] for each in found["causes"] if each["code"] == "tensor_not_told")
    assert found["culprit"] is None
    for text in (terminal.replace(" ", ""), sentence.replace(" ", ""), html.replace(" ", "")):
        assert all(each.replace(" ", "") in text for each in (not_told, *to_give))
    for name in ("attention_scores", "mlp_activation"):
        assert words(language).name("categories", name) not in terminal, "no tensor is named"


def test_a_configuration_without_a_card_asks_for_the_card():
    message = "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB."
    found = explain(message, config=TrainConfig(**SMALL, compile=False))
    assert found.unplayed_because == "card"
    assert found.culprit is None
    assert found.causes[0].code == "tensor_not_told_without_gpu"
    assert "--gpu NAME" in render(found, words("en"))


def test_deleting_logits_is_advised_only_inside_estimate_loss():
    message = STORY + "\n"
    assert "release_logits" in by_code(explain(SURROUNDED))
    elsewhere = SURROUNDED.replace("estimate_loss", "evaluation_loop")
    assert "release_logits" not in by_code(explain(elsewhere + message))


def test_without_a_configuration_the_figures_judge_what_they_can():
    found = explain(STORY)
    assert found.unplayed_because == "config"
    assert by_code(found)["expandable_segments"].verdict == "does_not_fit"
    assert by_code(found)["close_others"].verdict == "does_not_fit"
    assert by_code(found)["split_general"].verdict == "unchecked"
    assert by_code(found)["split_general"].applicability == "exact"
    assert "--config" in render(found, words("en"))


def test_a_small_request_tells_nothing():
    found = explain(STORY.replace("6.14 GiB", "20.00 MiB").replace("2.68 GiB", "10.00 MiB"))
    assert found.culprit is None
    assert "small_request" in [each.code for each in found.causes]
    assert "cannot be told" in render(found, words("en"))
    assert "over 1 MiB and under 10 MiB, or over 18 and up to 20.00 MiB" in " ".join(render(found, words("en")).split())
    smallest = explain(STORY.replace("6.14 GiB", "2.00 MiB").replace("2.68 GiB", "1.00 MiB"))
    assert "any tensor of up to 1.00 MiB" in " ".join(render(smallest, words("en")).split())


def test_a_host_kill_is_explained_without_a_play():
    for language, title in (("en", "Problem"), ("ja", "問題分析")):
        text = render(explain("step 10\nKilled\n", lang=language), words(language))
        assert text.startswith(title)
        assert "num_workers" in text


@pytest.mark.parametrize("language", ["en", "ja"])
def test_no_failure_is_said_shortly(language: str):
    found = explain("iter 0: loss 3.0, time 10ms\n", lang=language)
    assert found.facts is None
    assert len(render(found, words(language), width=100).splitlines()) <= 2
    as_json = msgspec.to_builtins(found.to_json())
    assert as_json["kind"] is None
    assert tuple(as_json) == KEYS


def test_control_codes_are_not_passed_on():
    log = SURROUNDED.replace("logits = self", "\x1b[31m\x9b2Jlogits\x07 = self").replace(
        "forward", "for\x1b]0;x\x07ward"
    )
    text = render(explain(log), words("en"), verbose=True)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


# The card


def test_the_card_is_the_usual_one_of_that_size_and_said_to_be_assumed():
    reading = read_log(STORY)
    assert reading.failure is not None
    card = card_of(reading.failure, reading.context, None)
    assert card is not None
    assert (card.name, card.how_named) == ("GeForce RTX 3060 12GB", "assumed")
    assert (card.total_bytes, card.used_bytes) == (12552041923, 2115271394)
    named = card_of(reading.failure, Printed(gpu_name="NVIDIA GeForce RTX 3060 Ti"), None)
    assert named is not None
    assert (named.name, named.how_named) == ("GeForce RTX 3060 Ti", "printed")
    with pytest.raises(DeviceError):
        card_of(reading.failure, reading.context, "no such card")


def test_an_assumed_card_is_named_before_what_was_simulated_on_it():
    found = explain(STORY, lang="en")
    card = card_of(found.facts, found.reading.context, None)
    problem, _, after = render(msgspec.structs.replace(found, card=card, played="script"), words("en")).partition(
        "Cause\n"
    )
    assert "Assumed card: GeForce RTX 3060 12GB" in problem
    assert "Assumed card" not in after


def test_without_a_log_no_log_is_blamed_for_the_missing_card(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text("import torch\n")
    with pytest.raises(ConfigError, match="nothing names the card to play the script on; name it with --gpu"):
        explain("", script=str(script), lang="en")


def test_the_configuration_that_a_log_prints_is_played(monkeypatch: pytest.MonkeyPatch):

    asked = []
    monkeypatch.setattr(Plays, "play", lambda plays, stage: asked.append((plays.card, plays.run.config)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(NANOGPT + STORY)
    ((card, run),) = asked
    assert (run.batch_size, run.block_size, run.gradient_accumulation_steps, run.vocab_size) == (64, 1024, 40, 50304)
    assert (card.how_named, run.compile, run.dtype) == ("printed", True, "bfloat16")


# The command


def test_the_command_reads_a_pipe_and_a_file(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Piped(io.TextIOWrapper):
        def isatty(self) -> bool:
            return False

    monkeypatch.setattr("sys.stdin", Piped(io.BytesIO(STORY.encode())))
    assert main(["explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_bytes"] == 12552041923
    log = tmp_path / "oom.log"
    log.write_text(STORY)
    assert main(["explain", str(log), "--lang", "ja"]) == 0
    assert capsys.readouterr().out.startswith("問題分析")
    monkeypatch.delenv("TIGHTFIT_LANG", raising=False)
    monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
    assert main(["explain", str(log)]) == 0
    assert capsys.readouterr().out.startswith("問題分析")


def test_a_log_with_a_torn_end_or_in_another_encoding_is_a_text(capsys, tmp_path: Path):
    for number, noise in enumerate((b"\x00" * 4096, "报错了\n".encode("gbk") * 50, bytes(range(256)))):
        log = tmp_path / f"{number}.log"
        log.write_bytes(b"iter 0: loss 10.9\n" * 400 + noise)
        assert main(["explain", str(log)]) == 0
        assert "This log shows no failure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.log"], "nothing.log cannot be read"),
        (["a.log", "b.log"], "one log is explained at a time"),
        (["a.log", "--lang", "fr"], "--lang must be one of"),
        (["a.log", "--config", "nothing.py"], "nothing.py"),
        (["a.log", "--batch_siz=8"], "did you mean --batch_size?"),
        (["a.log", "--gpu"], "--gpu needs a value"),
        (["a.log", "--", "x"], "name it with --script"),
        (["ckpt.pt"], "ckpt.pt is not a text; give what the run printed"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], says: str, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.log").write_text("nothing")
    torch.save({"weights": torch.randn(1000)}, tmp_path / "ckpt.pt")
    assert main(["explain", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert not printed.out


SCRIPT = """
import sys
import torch
from torch import nn
width = int(sys.argv[1])
model = nn.Linear(width, width).to("cuda")
for _ in range(3):
    model(torch.ones(64, width, device="cuda")).sum().backward()
"""


BATCHED = """
import argparse
import torch
from torch import nn
parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int)
parser.add_argument("--accum", type=int, default=1)
options = parser.parse_args()
model = nn.Linear(1024, 65536).to("cuda")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for _ in range(options.accum):
        model(torch.ones(options.batch_size, 1024, device="cuda")).relu().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize(("arguments", "pasted", "exact"), [
    pytest.param(["--batch-size=32768"], "--batch-size=2048", False, marks=pytest.mark.slow),
    pytest.param(["--batch-size", "32768", "--accum", "2"], "--batch-size=2048 --accum=32", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_dry_run_ends_with_its_explanation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], pasted: str, exact: bool
):
    """32768 x 65536 float32 numbers are 8 GiB, twice in the forward pass; a sixteenth of it has room."""
    script = tmp_path / "train.py"
    script.write_text(BATCHED)
    assert main(["dryrun", "--gpu", "RTX 3060 12GB", "--lang=en", str(script), *arguments]) == 1
    text = capsys.readouterr().out
    assert text.startswith("DOES NOT FIT")
    problem = re.sub(r"\n {2,5}(?=\S)", " ", text[text.index("\nProblem\n") :])  # as on a wider terminal
    assert "What did not fit: activations, (32768, 65536) float32, 8.00 GiB" in problem
    assert "the same request" not in problem, "the message is the play's own"
    assert "--batch-size=2048 instead of 32768: FITS" in problem
    assert f"      {pasted}\n" in text
    assert ("[exact, " in problem) is exact
    assert main(["dryrun", "--gpu", "RTX 3060 12GB", "--no-explain", str(script), *arguments]) == 1
    assert "Problem" not in capsys.readouterr().out


def test_somebodys_own_script_is_played(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    found = explain(None, script=str(script), arguments=["45000"], gpu="RTX 3060 12GB")
    assert found.facts is not None
    assert found.facts.kind == "cuda_out_of_memory"
    culprit = found.culprit
    assert culprit is not None
    assert (culprit.shape, culprit.dtype, culprit.phase) == ((45000, 45000), "float32", "backward")
    assert culprit.file.endswith("train.py")
    cache = by_code(found)["expandable_segments"]
    assert (cache.verdict, cache.label) == ("does_not_fit", "measured"), "16 MiB are cached, 3.6 GiB were short"
    assert explain(None, script=str(script), arguments=["100"], gpu="RTX 3060 12GB").facts is None
    with pytest.raises(ConfigError, match="name it with --gpu"):
        explain(None, script=str(script))
