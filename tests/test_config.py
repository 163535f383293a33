import ast
import contextlib
import inspect
import random
import re
import warnings
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import pytest

from tightfit.config import SampleConfig, TrainConfig, describe, from_dict, read_config, schema, to_dict
from tightfit.config.pyfile import read_pyfile
from tightfit.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"

# karpathy/nanoGPT train.py and sample.py, except what DESIGN.md leaves to the machine.
NANOGPT_TRAIN = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
    "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5,
}  # fmt: skip
NANOGPT_SAMPLE = {
    "init_from": "resume", "out_dir": "out", "start": "\n", "num_samples": 10, "max_new_tokens": 500,
    "temperature": 0.8, "top_k": 200, "seed": 1337, "compile": False,
}  # fmt: skip


def train(*arguments: str) -> TrainConfig:
    return read_config(TrainConfig, arguments).config


def refused(*arguments: str, by=TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(by, arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes the text of a config file and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "x.py") -> str:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return write


# The schema


@pytest.mark.parametrize(("kind", "facts"), [(TrainConfig, NANOGPT_TRAIN), (SampleConfig, NANOGPT_SAMPLE)])
def test_defaults_are_nanogpts_in_value_and_type(kind, facts):
    config = to_dict(kind())
    assert {key: config[key] for key in facts} == facts
    assert {key: type(config[key]) for key in facts} == {key: type(value) for key, value in facts.items()}


def test_every_field_has_its_sentence():
    for kind in (TrainConfig, SampleConfig):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for field, after in pairwise(body):
            if isinstance(field, ast.AnnAssign):
                assert ast.unparse(after).rstrip("'\"").endswith("."), field.target.id


def test_a_configuration_cannot_change():
    with pytest.raises(FrozenInstanceError):
        TrainConfig().batch_size = 1


def test_derived_sizes_by_hand():
    config = TrainConfig(batch_size=64, gradient_accumulation_steps=2, block_size=1024)
    assert (config.effective_batch, config.tokens_per_step) == (128, 131_072)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0; the default is 12"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0; the default is 0.0"),
        ({"beta2": -0.1}, "beta2 must be at least 0 and below 1, got -0.1; the default is 0.95"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0.0; the default is 0.0006"),
        ({"learning_rate": float("nan")}, "learning_rate takes a finite number, got nan"),
        ({"grad_clip": float("inf")}, "grad_clip takes a finite number, got inf"),
        ({"weight_decay": 10**400}, "weight_decay takes a finite number, got a whole number of 1329 bits"),
        ({"max_iters": 1.5}, "max_iters takes a whole number, got 1.5"),
        ({"max_iters": 2**63}, "max_iters must be below 2**63, got 9223372036854775808"),
        ({"batch_size": True}, "batch_size takes a whole number, got True"),
        ({"bias": 2}, "bias takes True or False, got 2"),
        ({"out_dir": 3}, "out_dir takes text, got 3"),
        ({"out_dir": ""}, "out_dir must be not empty, got ''; the default is 'out'"),
        ({"out_dir": "a\0b"}, r"out_dir must be UTF-8 text without NUL, got 'a\x00b'"),
        ({"start": "\ud800"}, r"start must be UTF-8 text without NUL, got '\ud800'"),
        ({"dtype": "bf16"}, "one of auto, float32, bfloat16, float16, got 'bf16'; the default is 'auto'"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda, cuda:N or mps, got 'cuda:x'"),
        ({"device": "cuda\n"}, r"device must be auto, cpu, cuda, cuda:N or mps, got 'cuda\n'"),
        ({"compile": "fast"}, "compile must be True, False or auto, got 'fast'"),
        ({"init_from": "scrach"}, "got 'scrach'; write a path in the working folder as ./name"),
        ({"n_head": 7}, "n_embd=768 must be a multiple of n_head=7, like 770"),
        (
            {"micro_batch": 481},
            "micro_batch=481 must not exceed batch_size * gradient_accumulation_steps=480",
        ),
        ({"activation_checkpointing": 13}, "activation_checkpointing=13 must not exceed n_layer=12"),
        (
            {"max_iters": 100, "warmup_iters": 100, "lr_decay_iters": 100},
            "warmup_iters and lr_decay_iters are both 100, so the decay has no length; raise lr_decay_iters",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 3e-5, "decay_lr": False},  # nanoGPT's finetune_shakespeare
        {
            "max_iters": 1000,
            "warmup_iters": 2000,
            "lr_decay_iters": 2000,
        },  # the step that divides is not reached
        {"warmup_iters": 2000, "lr_decay_iters": 1000},  # nanoGPT jumps to min_lr there
        {"init_from": "gpt2-xl", "activation_checkpointing": 48},
        {"init_from": "runs/one/ckpt.pt"},
        {"device": "cuda:3"},
        {"compile": "auto"},
        {"max_iters": 0, "dropout": 0, "grad_clip": 0},
    ],
)
def test_what_nanogpt_runs_is_accepted(values):
    assert to_dict(TrainConfig(**values)).items() >= values.items()


def test_sampling_has_its_own_rules():
    with pytest.raises(ConfigError, match=r"temperature must be above 0, got 0\.0; top_k=1 always takes"):
        SampleConfig(temperature=0)
    with pytest.raises(ConfigError, match="no weights to sample from; use resume, gpt2 or a path"):
        SampleConfig(init_from="scratch")


def test_checkpoint_round_trip_and_foreign_entries():
    config = TrainConfig(n_layer=3, compile=True, start="Ach, ")
    assert from_dict(TrainConfig, to_dict(config)) == (config, ())
    nanogpt = {
        **NANOGPT_TRAIN,
        "device": "cuda",
        "dtype": "float16",
        "compile": True,
        "backend": "nccl",
        "mine": 1,
    }
    loaded, dropped = from_dict(TrainConfig, nanogpt)
    assert (loaded.device, loaded.backend, loaded.compile, dropped) == ("cuda", "nccl", True, ("mine",))


# The command line


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--batch_size=32"], "batch_size", 32),
        (["--batch-size", "32"], "batch_size", 32),
        (["--batch_size=8", "--batch_size=9"], "batch_size", 9),
        (["--max_iters=1e5"], "max_iters", 100_000),
        (["--max_iters=2_000.0"], "max_iters", 2000),
        (["--weight_decay=0"], "weight_decay", 0.0),
        (["--compile"], "compile", True),
        (["--compile=False"], "compile", False),
        (["--compile", "no", "--bias"], "compile", False),
        (["--compile", "auto"], "compile", "auto"),
        (["--no-compile"], "compile", False),
        (["--no_decay_lr"], "decay_lr", False),
        (["--eval_only=1"], "eval_only", True),
        (["--eval_only=TRUE"], "eval_only", True),
        (["--out_dir=a=b"], "out_dir", "a=b"),
        (["--out_dir='out 2'"], "out_dir", "out 2"),
        (["--wandb_run_name=123"], "wandb_run_name", "123"),
        (["--wandb_run_name=True"], "wandb_run_name", "True"),
        (["--start=\\n"], "start", "\\n"),
        (["--start='a\\nb'"], "start", "a\nb"),
        (["--start=\"Hi\" she said \"no\""], "start", '"Hi" she said "no"'),
        (["--start='"], "start", "'"),
        (["--start", "-x"], "start", "-x"),
        (["--start=-x=--y"], "start", "-x=--y"),
    ],
)  # fmt: skip
def test_values_as_typed_in_a_shell(arguments, key, value):
    got = getattr(train(*arguments), key)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_iter=5"], "--max_iter is not a key; did you mean --max_iters?"),
        (["--zzz=5"], "--zzz is not a key; keys are written --key=value"),
        (["--num_samples=5"], "--num_samples is not a key"),
        (["--=5"], "-- is not a key"),
        (["--batch_size=1.5"], "batch_size takes a whole number, got 1.5"),
        (["--batch_size=True"], "batch_size takes a whole number, got True"),
        (["--batch_size=many"], "batch_size takes a whole number, got 'many'"),
        (["--batch_size=" + "(" * 5000], "batch_size takes a whole number, got '((("),
        (["--batch_size=__import__('os').getcwd()"], "batch_size takes a whole number, got \"__import__"),
        (["--batch_size"], "--batch_size needs a value; write --batch_size=VALUE"),
        (["--batch-size", "--compile"], "--batch-size needs a value"),
        (["--learning_rate=1e999"], "learning_rate takes a finite number, got inf"),
        (["--eval_only=maybe"], "eval_only takes True or False, got 'maybe'"),
        (["--no-compile=1"], "--no-compile takes no value, got '1'; write --compile=True or False"),
        (["--no-batch_size"], "--no-batch_size is not a key; did you mean --batch_size?"),
        (["batch_size=8"], "batch_size=8 is neither a file nor an option; write --batch_size=8"),
        (["-batch_size=8"], "-batch_size=8 is neither a file nor an option; write --batch_size=8"),
        (["batch_size", "8"], "batch_size is neither a file nor an option; write --batch_size=VALUE"),
        (["nowhere.py"], "there is no file nowhere.py; give a config file or --key=value"),
    ],
)  # fmt: skip
def test_a_wrong_argument_gets_one_clear_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


def test_order_decides_and_sources_tell(file):
    name = file("batch_size = 4\n\nmax_iters = batch_size * 10\nfoo = 1\n")
    heard = []
    resolved = read_config(TrainConfig, ["--batch_size=2", name, "--max_iters=7", "--bias"], warn=heard.append)
    assert describe(resolved) == [
        ("batch_size", 4, "x.py:1"),
        ("bias", True, "command line"),
        ("max_iters", 7, "command line"),
    ]
    assert resolved.sources["seed"] == "default"
    assert list(resolved.warnings) == heard == ["x.py:4: foo is not a key and is ignored"]


def test_an_error_in_a_file_names_file_and_line(file):
    assert refused(file("\nbatch_size = 0")) == "x.py:2: batch_size must be at least 1, got 0; the default is 12"
    assert train("x.py", "--batch_size=8").batch_size == 8


def test_a_missing_file_suggests_the_near_ones(file, tmp_path):
    (tmp_path / "configs").mkdir()
    file("", "configs/train_gpt2.py")
    near = "did you mean configs/train_gpt2.py?"
    assert near in refused("config/train_gpt2.py")
    assert near in refused("train_gpt.py")
    assert refused("configs") == "configs is a folder; name a config file, like configs/train_gpt2.py"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfex\0", "x.py is not UTF-8 text (byte 0); save it as UTF-8"),
        (b"x = 1\0", "null bytes"),
        (b"#" * 70_000, "x.py is larger than 65536 bytes"),
        (b"batch_size: 32\n  x: 1", "x.py:2: not Python (unexpected indent); correct this line"),
        (b"x = " + b"-" * 50_000 + b"1", "x.py nests an expression too deeply"),
        (b"x = " + b"1+" * 30_000 + b"1", "x.py nests an expression too deeply"),
        (b"x = " + b"(" * 500, "too many nested parentheses"),
        (b"x = " + b"9" * 60_000, "x.py:1: not Python (Exceeds the limit"),
    ],
)
def test_what_is_no_config_file(file, content, message):
    assert message in refused(file(content))


# Config files


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ('"""A docstring."""\nbatch_size = 5 * 8  # comment', "batch_size", 40),
        ("\ufeffbatch_size = 2**5 + 7 // 2 - 7 % 4", "batch_size", 32),
        ("batch_size = n_layer, n_head = 4, 2\nbatch_size = n_layer", "batch_size", 4),
        ("batch_size: int = 0b101 | 2 & 3 ^ 1 << 3 >> 1", "batch_size", 5 | 2 & 3 ^ 1 << 3 >> 1),
        ("batch_size += 4", "batch_size", 16),
        ("n_layer, batch_size = [2, 3]", "batch_size", 3),
        ("lr_decay_iters = max_iters", "lr_decay_iters", 600_000),
        ("sizes = {'a': 1}\nbatch_size = len(sizes)", "batch_size", 1),
        ("batch_size = min(7, max(3, 4), round(6.6), abs(-9), int('5'))", "batch_size", 4),
        ("learning_rate = -(-3e-4)\nmin_lr = learning_rate / 10", "min_lr", 3e-4 / 10),
        ("compile = not (1 < 2 <= 2 and 'a' in 'abc' or None is None)", "compile", False),
        ("dtype = 'float32' if eval_only else 'bfloat16'", "dtype", "bfloat16"),
        ("if batch_size > 10:\n    n_layer = 2\nelif 1:\n    pass\nelse:\n    n_layer = os", "n_layer", 2),
        ("out_dir = 'a' 'b' + str(3) + f'-{n_layer:03d}{1.5!r:>5}'", "out_dir", "ab3-012  1.5"),
        ("out_dir = 'run-%d-%s' % (batch_size, dataset)", "out_dir", "run-12-openwebtext"),
        ("out_dir = dataset + '-x'", "out_dir", "openwebtext-x"),
        ("_base = 3\nn_layers = _base\nn_layer = n_layers", "n_layer", 3),
        ("n_layer = 1e1", "n_layer", 10),
        ("eval_only = 1", "eval_only", True),
    ],
)
def test_what_a_file_may_compute(file, text, key, value):
    got = getattr(train(file(text)), key)
    assert (got, type(got)) == (value, type(value))


def test_time_is_known(file):
    config = train(file("import time\nwandb_run_name = 'ft-' + str(time.time())\nout_dir = time.strftime('o%Y')"))
    assert re.fullmatch(r"ft-\d{10}\.\d+", config.wandb_run_name)
    assert re.fullmatch(r"o20\d\d", config.out_dir)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import os",
            "`import os` is an import, and a config file may only compute values; only `import time`",
        ),
        ("from time import time", "is an import"),
        ("import time as t", "is an import"),
        ("x = open('planted', 'w')", "`open('planted', 'w')` is a call"),
        (
            "open('planted', 'w')",
            "is a call, and a config file may only compute values; the calls known are str",
        ),
        ("x = torch.cuda.is_available()", "`torch.cuda.is_available()` is a call"),
        ("x = os.environ", "`os.environ` is an attribute access"),
        ("x = ''.join", "is an attribute access"),
        ("x = f'{dataset.__class__}'", "`dataset.__class__` is an attribute access"),
        ("x = '{0.__class__}'.format(1)", "is a call"),
        ("x = [1][0]", "is a subscript"),
        ("x = lambda: 1", "is a lambda"),
        ("x = [i for i in (1, 2)]", "is a comprehension"),
        ("x = (y := 1)", "is an assignment inside an expression; give it a line of its own"),
        ("x, *y = 1, 2", "cannot be assigned; a config file sets plain names"),
        ("x.y = 1", "cannot be assigned"),
        ("x = min(*(1, 2))", "`*(1, 2)` is an unpacking"),
        ("x = {**{}}", "is not a plain value"),
        ("x = {1}", "is a set"),
        ("x = b'1'", "is not a plain value"),
        ("x = min((1,), key=open)", "is a call"),
        ("del dataset", "is a deletion"),
        ("for i in (1, 2): pass", "is a loop"),
        ("while 1: pass", "is a loop"),
        ("with 1: pass", "is a with block"),
        ("async def f(): pass", "is a function definition"),
        ("class A: pass", "is a class definition"),
        ("try: pass\nexcept: pass", "is a try block"),
        ("assert 1", "is an assertion"),
        ("global x", "is not a plain value"),
        ("x: int", "is not a plain value"),
        ("3 + 4", "`3 + 4` is not a plain value"),
        ("x = y", "`y` is neither a key nor a name assigned before"),
        ("x = max_iter", "`max_iter` is neither a key nor a name assigned before; did you mean max_iters?"),
        ("x, y = 1, 2, 3", "needs 2 values on the right"),
        ("x = 1 / 0", "cannot be computed: division by zero"),
        ("x = 'a' + 1", "cannot be computed: can only concatenate str"),
        ("x = {[]: 1}", "cannot be computed: unhashable type"),
        ("x = (-8) ** 0.5", "is a complex number"),
        ("x = {} | {}", "uses an operator that config files do not have for such values"),
        ("x = 1 @ 2", "uses an operator"),
        ("max_iter = 5", "max_iter is not a key; did you mean max_iters?"),
    ],
)
def test_what_a_file_may_not_do(file, tmp_path, code, said):
    message = refused(file("\n" + code))
    assert message.startswith("x.py:2: ")
    assert said.replace("; give", ", and a config file may only compute values; give") in message
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "code",
    [
        "x = 9**9**9", "x = 1 << 10**12", "x = 2**1000 * 2**1000", "x = 0x" + "f" * 400,
        "x = round(5, -10**9)", "x = 'a' * 10**12", "x = 10**12 * 'a'", "x = [0] * 10**10",
        "x = (0,) * 10**10",
        "x = '" + "a" * 10_001 + "'", "x = 'a' * 9000\nx += x", "x = [1]\n" + "x = [x, x]\n" * 40,
        "x = [1]\n" + "x = [x]\n" * 5000, "x = [2**1000] * 900\ny = str(x)",
        "x = [0] * 900\ny = f'" + "{x}" * 9000 + "'", "x = f'{1:>1000000000}'", "y = 10**9\nx = f'{1:{y}}'",
        "x = f'{1.5:.1000000000f}'", "x = f'{1:>１００００００００}'", "x = '%1000000000d' % 1",
        "x = '%*d' % (10**9, 1)", "x = '%.1000000000f' % 1", "x = '%l%%1000000000d' % 1",
        "x = '%5%%1000000000d' % 1", "x = '%(a)1000000000d' % {'a': 1}", "x = time.strftime('%1000000000Y')",
    ],
)  # fmt: skip
def test_no_file_takes_much_time_or_memory(file, code):
    assert refused(file(code)).startswith("x.py:")  # the test's own time limit is the suite's


def test_unknown_names_warn_unless_surely_misspelt(file):
    resolved = read_config(TrainConfig, [file("epochs = 3\n_x = 1\nwarmup_iterations = 4\nh = 1\nn_layer = h")])
    assert resolved.warnings == (
        "x.py:1: epochs is not a key and is ignored",
        "x.py:3: warmup_iterations is not a key and is ignored; the nearest is warmup_iters",
    )


def test_sampling_may_name_a_training_file(file):
    name = file("out_dir = 'mine'\nbatch_size = 3\nlearning_rate = 1e-3")
    resolved = read_config(SampleConfig, [name, "--top_k=5"])
    assert (resolved.config.out_dir, resolved.config.top_k, resolved.warnings) == ("mine", 5, ())
    assert "--batch_size is not a key" in refused("--batch_size=3", by=SampleConfig)


def test_mutated_files_only_ever_raise_config_errors(file, tmp_path):
    """The law of the room: whatever the text, a value or a ConfigError, and nothing is run."""
    dice = random.Random(1337)
    text = "\n".join(path.read_text() for path in sorted(CONFIGS.glob("*.py")))
    pieces = [
        *"()[]{}:=,'\"\\\n\t \r\f\0\ud7ffé#%*-+.<>@~", "open('planted', 'w')",
        "exec('open(\"planted\", \"w\")')",
        "lambda ", "f'{", "if ", "else:", "**", "{x!r:>9}", "import os", "time.time()", "batch_size", " in ",
    ]  # fmt: skip
    read = 0
    for _ in range(2000):
        start = dice.randrange(len(text))
        mutant = text[start : start + dice.randrange(10, 400)]
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(mutant) + 1)
            mutant = mutant[:at] + dice.choice(pieces) + mutant[at + dice.randrange(4) :]
        try:
            read_config(TrainConfig, [file(mutant)])
            read += 1
        except ConfigError:
            pass
    assert not (tmp_path / "planted").exists()
    assert read > 10  # the mutants were not all broken at the surface


LEAVES = [
    "0", "1", "7", "-3", "2.5", "True", "None", "'ab'", "'%s'", "''", "[1]", "(3,)", "{2:1}", "1e300",
    "2**60",
]  # fmt: skip
FORMS = [
    "({a}+{b})", "({a}-{b})", "({a}*{b})", "({a}/{b})", "({a}//{b})", "({a}%{b})", "({a}**{b})",
    "({a}<<{b})", "({a}>>{b})", "({a}&{b})", "({a}<{b}<={c})", "({a} in {b})", "({a} != {b})",
    "({a} and {b} or {c})", "({a} if {b} else {c})", "(not {a})", "(~{a})", "(-{a})", "[{a},{b}]",
    "({a},{b})", "str({a})", "int({a})", "float({a})", "bool({a})", "len({a})", "min({a},{b})",
    "max({a})", "round({a},{b})", "abs({a})", 'f"{{{a}!r}}-{{{b}:>5}}"',
]  # fmt: skip


def random_expression(dice: random.Random, depth: int) -> str:
    if depth == 0:
        return dice.choice(LEAVES)
    a, b, c = (random_expression(dice, dice.randrange(depth)) for _ in range(3))
    return dice.choice(FORMS).format(a=a, b=b, c=c)


def test_accepted_expressions_mean_what_python_means(file):
    dice = random.Random(1337)
    agreed = 0
    for _ in range(1000):
        code = random_expression(dice, 3)
        try:
            got = read_pyfile(file(f"x = {code}"), {"x": 0}).values["x"].value
        except ConfigError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of literals that are called
            assert repr(got) == repr(eval(code)), code  # built from the pieces above
        agreed += 1
    assert agreed > 150


def test_random_arguments_only_ever_raise_config_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dice = random.Random(1337)
    keys = [*schema.defaults(TrainConfig), "max_iter", "no_compile", ""]
    values = [
        "1", "-1", "0.5", "1e400", "nan", "True", "auto", "'", "", "''", "'a'", "{}", "[", "\0",
        "\udc80", "=",
    ]  # fmt: skip
    values += ["a=b", "x" * 9999, "9" * 9999]
    for _ in range(2000):
        forms = dice.choices(["--{}={}", "--{}", "{}={}", "-{}", "{1}", "--no-{}"], k=dice.randrange(1, 4))
        with contextlib.suppress(ConfigError):
            read_config(TrainConfig, [form.format(dice.choice(keys), dice.choice(values)) for form in forms])


# configs/


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        (
            "train_gpt2",
            {"wandb_log": True, "wandb_run_name": "gpt2-124M", "eval_interval": 1000, "log_interval": 10},
        ),
        (
            "train_shakespeare_char",
            {
                "out_dir": "out-shakespeare-char", "eval_interval": 250, "log_interval": 10,
                "always_save_checkpoint": False, "wandb_project": "shakespeare-char",
                "wandb_run_name": "mini-gpt", "dataset": "shakespeare_char", "gradient_accumulation_steps": 1,
                "batch_size": 64, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2,
                "learning_rate": 1e-3, "max_iters": 5000, "lr_decay_iters": 5000, "min_lr": 1e-4,
                "beta2": 0.99, "warmup_iters": 100,
            },
        ),
        (
            "finetune_shakespeare",
            {
                "out_dir": "out-shakespeare", "eval_interval": 5, "eval_iters": 40,
                "wandb_project": "shakespeare", "dataset": "shakespeare", "init_from": "gpt2-xl",
                "always_save_checkpoint": False, "batch_size": 1, "gradient_accumulation_steps": 32,
                "max_iters": 20, "learning_rate": 3e-5, "decay_lr": False,
            },
        ),
        (
            "train_openwebtext",
            {
                "out_dir": "out-openwebtext", "dataset": "openwebtext_local", "batch_size": 64,
                "gradient_accumulation_steps": 1, "vocab_size": 50304, "dtype": "bfloat16", "compile": True,
                "max_iters": 20000, "lr_decay_iters": 20000, "log_interval": 100,
            },
        ),
        *(
            (
                f"eval_{model.replace('-', '_')}",
                {"init_from": model, "eval_only": True, "batch_size": 8, "eval_iters": 500},
            )
            for model in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        ),
    ],
)  # fmt: skip
def test_our_files_hold_nanogpts_values(name, differs):
    resolved = read_config(TrainConfig, [str(CONFIGS / f"{name}.py")])
    found = {key: value for key, value, _ in describe(resolved)}
    if name == "finetune_shakespeare":
        assert re.fullmatch(r"ft-\d+\.\d+", found.pop("wandb_run_name"))
    assert (found, resolved.warnings) == (differs, ())


def test_where_there_is_no_such_file_ours_is_read_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = read_config(TrainConfig, ["configs/train_stdlib.py"])
    assert resolved.config.dataset == "stdlib"
    assert resolved.sources["dataset"] == "configs/train_stdlib.py:3"
    assert resolved.warnings == (
        "configs/train_stdlib.py is not in this folder: reading the one that comes with tightfit, "
        f"{CONFIGS / 'train_stdlib.py'}",
    )
    assert "did you mean configs/train_stdlib.py?" in refused("configs/train_stdlb.py")
    for other in ("train_stdlib.py", "configs/../configs/train_stdlib.py", "other/configs/train_stdlib.py"):
        assert "there is no file" in refused(other)


def test_a_file_that_is_there_comes_before_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train_stdlib.py").write_text("dataset = 'mine'")
    resolved = read_config(TrainConfig, ["configs/train_stdlib.py"])
    assert (resolved.config.dataset, resolved.warnings) == ("mine", ())


@pytest.mark.parametrize("key", ["supervise", "compile", "recover"])
def test_on_and_off_are_flags_too(key: str) -> None:
    for words, value in ((["off"], False), (["on"], True)):
        assert getattr(read_config(TrainConfig, [f"--{key}={words[0]}"]).config, key) is value
        assert getattr(read_config(TrainConfig, [f"--{key}", *words]).config, key) is value
