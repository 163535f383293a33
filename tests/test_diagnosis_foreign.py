"""Configurations and models of other programs: what `tightfit explain` reads from them and changes in them."""

import json
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from tightfit.cli.main import main
from tightfit.diagnosis import model_play
from tightfit.diagnosis.config_edits import edited
from tightfit.diagnosis.config_fix import config_fix
from tightfit.diagnosis.config_programs import known
from tightfit.diagnosis.config_rules import refused
from tightfit.diagnosis.config_values import Value, values_in
from tightfit.diagnosis.explaining import explain as explained
from tightfit.diagnosis.foreign_config import Foreign, foreign_in
from tightfit.diagnosis.model_run import ModelRun
from tightfit.diagnosis.outcome import Outcome
from tightfit.diagnosis.remedies import Resized
from tightfit.diagnosis.yaml_errors import first_error

LOG = """\
Traceback (most recent call last):
  File "/x/transformers/models/llama/modeling_llama.py", line 700, in forward
    hidden_states = self.mlp(hidden_states)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity of 23.64 GiB of which
 1.20 GiB is free. Process 123 has 22.43 GiB memory in use. Of the allocated memory 20.50 GiB is allocated by PyTorch,
 and 1.40 GiB is reserved by PyTorch but unallocated.
"""
LLAMA_FACTORY = """\
model_name_or_path: gpt2
finetuning_type: lora  # the adapter
per_device_train_batch_size: 8  # sequences
cutoff_len: 1024
"""
DEEPSPEED = """\
{
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3}
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_play, "can_play", lambda: False)
    Path("oom.log").write_text(LOG)
    return tmp_path


def explain(*words: str) -> int:
    return main(["explain", "oom.log", *words])


def test_a_diff_applies_with_patch(capsys: pytest.CaptureFixture[str]):
    Path("sft.yaml").write_text(LLAMA_FACTORY)
    assert explain("--config", "sft.yaml", "--fix") == 0
    shown = capsys.readouterr()
    assert Path("sft.yaml").read_text() == LLAMA_FACTORY
    assert "batch 2 x accumulation 4 instead of 8 x 1" in shown.err
    subprocess.run(["patch", "sft.yaml"], input=shown.out, text=True, check=True, capture_output=True)
    patched = Path("sft.yaml").read_text()
    changed = LLAMA_FACTORY.replace("size: 8", "size: 2") + "gradient_accumulation_steps: 4\n"
    assert patched == changed


def test_write_changes_only_the_values(capsys: pytest.CaptureFixture[str]):
    Path("ds.json").write_text(DEEPSPEED)
    assert explain("--config", "ds.json", "--fix", "--write") == 0
    assert Path("ds.json").read_text() == DEEPSPEED.replace('gpu": 4', 'gpu": 1').replace('steps": 2', 'steps": 8')
    assert '-    "train_micro_batch_size_per_gpu": 4,\n' in capsys.readouterr().out


def test_line_ends_of_windows_stay():
    Path("sft.yaml").write_bytes(LLAMA_FACTORY.replace("\n", "\r\n").encode())
    assert explain("--config", "sft.yaml", "--fix", "--write") == 0
    after = Path("sft.yaml").read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") == 5
    assert b"size: 2  # sequences\r\n" in after


def test_a_key_that_stands_twice_is_left_alone(capsys: pytest.CaptureFixture[str]):
    text = 'one:\n  "per_device_train_batch_size": 8\ntwo:\n  per_device_train_batch_size: 8\n'
    Path("sft.yaml").write_text(text)
    assert explain("--config", "sft.yaml", "--fix", "--write") in (0, 1)
    assert Path("sft.yaml").read_text().startswith(text)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--fix"], "--fix changes a configuration file; name it with --config FILE"),
        (["--config", "sft.yaml", "--write"], "--write changes the file as --fix shows it; give both"),
        (["--config", "sft.yaml", "--fix", "--json"], "--fix prints a diff, and --json a record; give one of them"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], rule: str, capsys: pytest.CaptureFixture[str]):
    Path("sft.yaml").write_text(LLAMA_FACTORY)
    assert explain(*words) == 2
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "english", "japanese"),
    [
        (DEEPSPEED[:60], ":3: this is JSON, and it ends too early", ":3: これは JSON ですが、途中で終わっています"),
        (
            '{\n  "name": "half a wo',
            ":2: this is JSON, and it ends too early",
            ":2: これは JSON ですが、途中で終わって",
        ),
        ('{\n  "a": 1\n  "b": 2\n}', ":3: this is JSON with an error", ":3: これは JSON ですが、誤りがあります"),
    ],
)
def test_json_that_is_cut_or_broken_is_called_json(
    text: str, english: str, japanese: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log, config = tmp_path / "run.log", tmp_path / "ds.json"
    log.write_text(LOG)
    config.write_text(text)
    for language, said in (("en", english), ("ja", japanese)):
        assert main(["explain", str(log), "--config", str(config), "--lang", language]) != 0
        told = capsys.readouterr().err
        assert said in told
        assert "Python" not in told


@pytest.mark.parametrize(
    ("text", "line", "english", "japanese"),
    [
        ("batch: 4\n  bad: [1,2\n", 2, "indented below a line that has a value already", "値のある行の下"),
        ("a:\n    b: 1\n  c: 2\n", 3, "its indentation fits no line above", "上のどの行とも"),
        ("a: 1\n\tb: 2\n", 2, "a tab indents it", "タブ"),
        ("a: [1,\n  2\nb: 3\n", 1, "is not closed", "閉じていません"),
        ("a: b: c\n", 1, "put the value in quotation marks", "引用符で囲んで"),
        ("a: 1\nbatch 4\n", 2, "no colon behind its key", "コロンがありません"),
        ("a: 1\nb:2\n", 2, "a space is missing behind its colon", "コロンの後に空白"),
        ('a: [\n  "b"\n  "c"\n]\n', 3, "a comma or a closing bracket is missing", "コンマまたは閉じ括弧"),
        ("---\na: [1,\n\n", 2, "is not closed", "閉じていません"),
        ("a: {b: 1,\n\tc: 2}\n", 2, "a tab indents it", "タブ"),
        ("a: @b\n", 1, "a character that YAML reserves", "予約文字"),
        ("a: 'it's'\n", 1, "YAML does not allow this here", "ここにこの書き方はできません"),
        ("a:\n  - b\n - c\n", 3, "its indentation fits no line above", "上のどの行とも"),
        ("a: \x1b\n", 1, "YAML does not allow this here", "ここにこの書き方はできません"),
        ("a:\r\n  - b: 1\r\n     c: 2\r\n", 3, "indented below a line that has a value", "値のある行の下"),
    ],
)
def test_yaml_that_is_broken_is_called_yaml(
    text: str, line: int, english: str, japanese: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log, config = tmp_path / "run.log", tmp_path / "sft.yaml"
    log.write_text(LOG)
    config.write_text("per_device_train_batch_size: 2\n" + text)
    for language, said in (("en", english), ("ja", japanese)):
        assert main(["explain", str(log), "--config", str(config), "--lang", language]) == 2
        told = capsys.readouterr().err
        assert f"sft.yaml:{line + 1}:" in told
        assert said in told


def test_yaml_that_may_be_right_is_read():
    text = (
        "a: &x {b: [1, 2], c: 'it''s: so'}\nd: |\n  e: f: g\n text\nh:\n- i: 1\n  j: k\n- |\n  l: m\n"
        "n: two\n  lines\n# o\np: http://q:80/r  # s: t\n---\nu:\n  ? v\n  : w\n"
        'w: "{# x #}\\n \\" # y" # z\nw2: it\'s # {\n'
    ).replace(" text", "  text")
    assert first_error(text) is None


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n", {"a.b": 1, "a.c": 2, "d.b": 1, "d.c": 3}),
        ("a: !!python/object/apply:os.mkdir [made]\nb: !ref <c>\n", {"a[]": "made", "b": "<c>"}),
        ("a: {b: [1, 'x, y'], \"c\": {d: e}}\n", {"a.b[]": "1, x, y", "a.c.d": "e"}),
        ("a: >-\n  b\n  c: d\ne: |\n  f: 1\n\n  g\n", {"a": "b c: d", "e": "f: 1\n\ng"}),
        ('a: two\n  lines\nb: "c: #\n  d"\n', {"a": "two lines", "b": "c: # d"}),
        ("a:\n- b: 1\n  c: x\n-\n  b: 2\n- d\n", {"a[]": "d", "a[].b": 2, "a[].c": "x"}),
        ("a: 1\na: {b: 2}\n", {"a.b": 2}),
        ("\ufeffa:\r\n  b: 1 # c\r\n", {"a.b": 1}),
        ("a: 1\n---\nb: 2\n...\n", {"a": 1, "b": 2}),
        ("a: 2e-5\nb: .5\nc: 1_000\nd: '1e5'\n", {"a": 2e-5, "b": 0.5, "c": 1000, "d": "1e5"}),
        ("on: on\nb: No\nc: ~\nd: !x\ne: .inf\n", {"on": True, "b": False, "c": None, "d": None, "e": ".inf"}),
        ("a: &a\n  b: *a\n", {}),
        ("a0: &a0 {b: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{b: *a{n}, c: *a{n}}}\n" for n in range(40)), {}),
    ],
)
def test_yaml_is_read_and_not_executed(text: str, values: dict[str, Value]):
    assert values_in("a.yaml", text) == values
    assert not Path("made").exists()


def test_a_key_that_is_not_there_is_added_to_json():
    Path("ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    assert explain("--config", "ds.json", "--fix", "--write") == 0
    after = json.loads(Path("ds.json").read_text())
    assert after == {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}


CONFIGS = tomllib.loads(Path(__file__).with_name("foreign_configs.toml").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_read_as_what_it_is(name: str):
    """The program, the values that are told, the step that is played, the fixes offered and the diff of --fix."""
    case = CONFIGS[name]
    path = Path(case["file"])
    path.write_text(case["text"])
    foreign = foreign_in([case["file"]], [])
    assert foreign is not None
    assert foreign.program == case["program"]
    found = explained(case.get("log", LOG), foreign=foreign)
    told = " ".join(str(found).split())
    for part in case.get("told", []):
        assert part in told
    pasted = "\n".join("\n".join(each.paste) for each in found.remedies)
    for line in case.get("offers", []):
        assert line in pasted
    for line in case.get("never", []):
        assert line not in told + pasted
    if "first" in case:
        assert found.remedies[0].code == case["first"]
    if "after" in case:
        fix = config_fix(found, [case["file"]])
        assert (fix.after if fix else None) == case["after"]


@pytest.mark.parametrize(
    ("file", "text", "english"),
    [
        ("compose.yml", "services:\n  trainer:\n    image: x:1\n    shm_size: 64m\n", "a file of Docker Compose"),
        ("job.yaml", "apiVersion: batch/v1\nkind: Job\nspec:\n  template: x\n", "a manifest of Kubernetes"),
        ("ci.yml", "on: [push]\njobs:\n  test:\n    runs-on: x\n", "a workflow of continuous integration"),
        ("pyproject.toml", '[build-system]\nrequires = ["hatchling"]\n', "a Python project's file"),
        ("package.json", '{"name": "a", "version": "1", "dependencies": {"b": "2"}}', "a package.json of Node.js"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 8}', "a PEFT adapter's configuration"),
        ("merge.yaml", "merge_method: slerp\nbase_model: a/b\n", "a recipe for merging models"),
        ("cut.toml", "[train]\nbatch_size = 4\nx\n", "this is TOML with an error"),
        ("odd.yaml", "lr: 0.1\nepochs: 3\n", "YAML without a key that tightfit knows"),
    ],
)
def test_a_file_that_no_training_reads_is_told_so(
    file: str, text: str, english: str, capsys: pytest.CaptureFixture[str]
):
    Path(file).write_text(text)
    for language, word in (("en", english), ("ja", "TOML ですが" if "TOML" in english else "学習の設定")):
        assert explain("--config", file, "--lang", language) == 2
        said = capsys.readouterr().err
        assert word in said
        assert "Python (" not in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "before", "settings"),
    [
        ("torchtune", {"optimizer_in_bwd": True}, {"gradient_accumulation_steps": 4}),
        ("axolotl", {"fsdp_config.offload_params": True}, {"optimizer": "adamw_bnb_8bit"}),
        ("axolotl", {"adapter": "lora", "load_in_8bit": True}, {"adapter": "qlora"}),
        ("axolotl", {"fsdp": "full_shard"}, {"deepspeed": "zero3.json"}),
        ("llama_factory", {"use_galore": True}, {"finetuning_type": "lora"}),
        ("llama_factory", {"deepspeed": "ds_z2.json", "pissa_init": True}, {"deepspeed": "ds_z3.json"}),
        ("transformers_trainer", {"fp16": True}, {"bf16": True}),
        ("litgpt", {"precision": "bf16-mixed"}, {"quantize": "bnb.nf4"}),
        ("kohya", {"additional.color_aug": True}, {"cache_latents": True}),
        ("deepspeed", {"fp16.enabled": True}, {"bf16.enabled": True}),
    ],
)
def test_settings_that_a_program_raises_for_together(
    program: str, before: dict[str, Value], settings: dict[str, Value]
):
    assert refused(settings, before, known(program))
    assert not refused(settings, {}, known(program))
    assert not refused(before, before | settings, known(program))  # so it was before


@pytest.mark.parametrize(
    ("file", "before", "settings", "after"),
    [
        (
            "a.yaml",
            "t:\n  b: 4  # c\n  d: e\nf: g\n",
            {"t.b": 2, "t.h": True},
            "t:\n  b: 2  # c\n  d: e\n  h: true\nf: g\n",
        ),
        ("a.yaml", "a: 1", {"p.q": "r"}, "a: 1\np:\n  q: r\n"),
        ("a.yaml", "k:\n", {"k": 2}, "k: 2\n"),
        ("a.yaml", "a: [1, 2]\n", {"a": 2}, None),
        ("a.yaml", "a: {b: 4, c: 'x, y'} # d\n", {"a.b": 2, "a.e": True}, "a: {b: 2, c: 'x, y', e: true} # d\n"),
        ("a.yaml", "a: &x {b: 4}\nc: *x\n", {"a.b": 2}, None),
        ("a.yaml", "a: &x {b: 4}\nc: *x\n", {"c.b": 2}, None),
        (
            "a.yaml",
            "a: &x {b: 4}\nc:\n  <<: *x # d\n\n# e\n",
            {"c.b": 2},
            "a: &x {b: 4}\nc:\n  <<: *x # d\n  b: 2\n\n# e\n",
        ),
        ("a.yaml", "a: !ref <b> # c\n", {"a": 2}, "a: 2 # c\n"),
        ("a.yaml", "t:\n  a: |\n    b: 1\n\n  b: 4\nu: 1", {"t.b": 2, "u": 3}, "t:\n  a: |\n    b: 1\n\n  b: 2\nu: 3"),
        ("a.yaml", "t:\n  a: |\n    b: 1\nu: 1\n", {"t.c": 2}, "t:\n  a: |\n    b: 1\n  c: 2\nu: 1\n"),
        ("a.yaml", "t:\n  - a: 4\n    b: 1\n", {"t[].a": 2}, "t:\n  - a: 2\n    b: 1\n"),
        ("a.yaml", "a: 4\na: 5\n", {"a": 2}, None),
        (
            "a.yaml",
            "\ufefft:\r\n  b: 4 # c\r\nu: 1\r\n",
            {"t.b": 2, "t.d": 3},
            "\ufefft:\r\n  b: 2 # c\r\n  d: 3\r\nu: 1\r\n",
        ),
        (
            "a.toml",
            "[t]\nb = 4 # c\n\n[u]\nb = 1\n",
            {"t.b": 2, "u.d": True},
            "[t]\nb = 2 # c\n\n[u]\nb = 1\nd = true\n",
        ),
        ("a.toml", "[t]\nb = 4\n", {"v.w": "x"}, '[t]\nb = 4\n\n[v]\nw = "x"\n'),
        ("a.json", '{"z": {"stage": 2}, "b": {}}', {"z.stage": 3, "z.o": 1}, '{"z": {"o": 1, "stage": 3}, "b": {}}'),
        ("a.json", '{\n  "a": 1\n}', {"p.q": True}, '{\n  "p": {"q": true},\n  "a": 1\n}'),
        ("a.json", '{"z": {"s": 2}}', {"z.o.d": "cpu"}, '{"z": {"o": {"d": "cpu"}, "s": 2}}'),
        ("a.json", '{"a": {"x": 1}, "b": {"x": 1}}', {"b.x": 2}, '{"a": {"x": 1}, "b": {"x": 2}}'),
        ("a.py", "a = 1  # b\n", {"a": 2}, "a = 2  # b\n"),
    ],
)
def test_a_value_is_changed_in_its_own_place(file: str, before: str, settings: dict[str, Value], after: str | None):
    assert edited(file, before, settings) == after


@pytest.mark.parametrize("named", ["ds_z2_offload.json", "plain.json"])
def test_the_stage_of_zero_stands_in_a_file_that_is_named(named: str):
    Path("plain.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    Path("sft.yaml").write_text(LLAMA_FACTORY + f"deepspeed: {named}\n")
    told = " ".join(str(explained(LOG, foreign=foreign_in(["sft.yaml"], []))).split())
    assert "ZeRO stage 2" in told
    assert "offloading to host memory" in told


def test_keys_of_the_command_line_are_read_by_their_program():
    found = foreign_in([], ["--per_device_train_batch_size=4", "--optim", "adamw_bnb_8bit", "--bf16"])
    assert found is not None
    assert found.program == "transformers_trainer"
    assert found.found is not None
    assert found.found.numbers == {"batch_size": 4}
    assert found.found.texts["optimizer"] == "adamw_bnb_8bit"


def test_a_fix_goes_into_the_file_whose_keys_it_changes():
    Path("sft.yaml").write_text(LLAMA_FACTORY)
    Path("ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    foreign = foreign_in(["sft.yaml", "ds.json"], [])
    fix = config_fix(explained(LOG, foreign=foreign), ["sft.yaml", "ds.json"])
    assert fix is not None
    assert fix.path == "sft.yaml"


@pytest.mark.parametrize(
    ("optimizer", "rest", "said"),
    [
        ("torch.optim.AdamW", "", "optimizer state of Llama 3 8B take 8 to 16 bytes x 8.03B"),
        ("bitsandbytes.optim.PagedAdamW8bit", "", "take 4 to 6 bytes x 8.03B"),
        ("torch.optim.AdamW", "fsdp_cpu_offload: True\n", None),
        ("bitsandbytes.optim.PagedAdamW8bit", "optimizer_in_bwd: True\n", "take 14.96 GiB"),
    ],
)
def test_the_arithmetic_counts_the_optimizer_that_is_configured(optimizer: str, rest: str, said: str | None):
    Path("tune.yaml").write_text(
        "model:\n  _component_: torchtune.models.llama3_1.llama3_1_8b\n"
        f"optimizer:\n  _component_: {optimizer}\nbatch_size: 1\n{rest}"
    )
    told = " ".join(str(explained(LOG, foreign=foreign_in(["tune.yaml"], []))).split())
    assert ("(TF-201)" in told) == (said is not None)
    assert said is None or said in told


QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "qwen", "qwen/config.json"])
def test_a_model_is_given_by_its_name_or_its_folder(model: str, capsys: pytest.CaptureFixture[str]):
    Path("qwen").mkdir()
    Path("qwen/config.json").write_text(json.dumps(QWEN))
    assert explain("--model", model) == 0
    assert "Qwen3 8B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--model=Lama 3 8B"], "nor a model whose sizes are known, such as Llama 3 8B"),
        (["--model=oom.log"], "oom.log describes no model"),
        (["--model=Qwen3-8B", "--n_layer=2"], "the configuration of tightfit train has its own model"),
    ],
)
def test_what_is_no_model_is_one_sentence(words: list[str], rule: str, capsys: pytest.CaptureFixture[str]):
    assert explain(*words) == 2
    assert rule in capsys.readouterr().err


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 100_000,
    "tie_word_embeddings": True,
}
SFT = """\
model_name_or_path: tiny
finetuning_type: full
per_device_train_batch_size: 16
gradient_accumulation_steps: 16
cutoff_len: 1024
bf16: true
"""


def given(sft: str) -> Foreign:
    Path("sft.yaml").write_text(sft)
    Path("config.json").write_text(json.dumps(TINY, indent=1))
    found = foreign_in(["sft.yaml", "config.json"], [])
    assert found is not None
    return found


class Played:
    """Steps that are asked for, answered without a play: all that is above a batch fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most: int) -> None:
        self.steps: list[ModelRun] = []
        self._most = most
        monkeypatch.setattr(model_play, "can_play", lambda: True)
        monkeypatch.setattr(model_play.ModelPlay, "_play", lambda play, run: self._outcome(run))

    def _outcome(self, run: ModelRun) -> Outcome:
        self.steps.append(run)
        return Outcome(
            fits=run.batch <= self._most,
            device_bytes=run.batch << 30,
            phase="forward",
            steps=2,
            categories={},
            not_modelled=(),
        )


@pytest.mark.parametrize(
    ("sft", "step"),
    [
        (SFT, {"weights": "float32", "cast": "bfloat16", "rank": 0, "checkpointing": True}),
        (SFT.replace(": full", ": lora\nlora_rank: 4"), {"weights": "bfloat16", "rank": 4, "optimizer": "adamw"}),
        (SFT.replace("bf16: true", "disable_gradient_checkpointing: true"), {"cast": "", "checkpointing": False}),
        (
            SFT + "optim: adafactor\ndeepspeed: null\nfsdp: ''\n",
            {"optimizer": "adafactor", "batch": 16, "accumulation": 16, "length": 1024},
        ),
        (SFT + "quantization_bit: 4\n", None),
        (SFT + "optim: adamw_8bit\n", None),
        (SFT + "deepspeed: ds_z3_config.json\n", None),
        (SFT.replace("cutoff_len: 1024\n", ""), None),
    ],
)
def test_the_step_that_is_played(sft: str, step: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch):
    played = Played(monkeypatch, most=0)
    found = explained(LOG, foreign=given(sft))
    assert (found.played == "model") == (step is not None)
    if step is not None:
        assert step.items() <= msgspec.to_builtins(played.steps[0]).items()
        assert found.causes[0].code == "model_step"


def test_one_sequence_is_tried_where_a_quarter_is_not_enough(monkeypatch: pytest.MonkeyPatch):
    """Batch and passes are both 16: each number of the pasted lines is the one that its key stands for."""
    played = Played(monkeypatch, most=1)
    best = explained(LOG, foreign=given(SFT)).best
    assert [each.batch for each in played.steps[:3]] == [16, 4, 1]
    assert best is not None
    assert best.paste == ("per_device_train_batch_size: 1", "gradient_accumulation_steps: 256")
    assert isinstance(best.change, Resized)
    assert best.change.parts == 16


@pytest.mark.slow
def test_a_model_is_really_played(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_play, "can_play", lambda: True)
    pytest.importorskip("transformers")
    given(SFT)
    assert explain("--config", "sft.yaml", "--model", "config.json") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fails on this card, too, in the backward pass" in shown
    assert "batch 4 x accumulation 64 instead of 16 x 16: FITS" in shown


def test_a_configuration_without_a_log_is_read_and_counted():
    Path("sft.yaml").write_text(
        "model_name_or_path: Qwen/Qwen2.5-7B-Instruct\nstage: sft\nfinetuning_type: full\n"
        "cutoff_len: 4096\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 8\nbf16: true\n"
    )
    for lang in ("en", "ja"):
        found = explained("", foreign=foreign_in(["sft.yaml"], []), lang=lang)
        told = "".join(str(found).split())
        for part in ("LLaMA-Factory", "4096", "14.19GiB", "56.74GiB", "113.48GiB"):
            assert part in told, (lang, part)
