"""The model: equal to transformers' GPT-2, compatible with nanoGPT's checkpoints, and each fast path against truth."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit.errors import CheckpointError, ConfigError
from tightfit.models import attention, linear
from tightfit.models.attention import KeyValueCache, causal_attention
from tightfit.models.linear import LayerNorm, gelu_linear, norm_linear, plain_linear
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
Function = Callable[[Tensor], Tensor]
THEIR_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def tiny(**changes: Any) -> GPTConfig:
    return GPTConfig(**{"block_size": 32, "vocab_size": 67, "n_layer": 3, "n_head": 2, "n_embd": 24, **changes})


def build(config: GPTConfig, *, seed: int = 0, **options: Any) -> GPT:
    """A model none of whose vectors is all zeros or ones, so that no bias or gain goes untested."""
    torch.manual_seed(seed)
    model = GPT.on_device(config, torch.device("cpu"), **options).init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def draw_tokens(config: GPTConfig, b: int, t: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (b, t), generator=torch.Generator().manual_seed(seed))


def all_logits(model: GPT, idx: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(model.hidden(idx))
    return logits


def relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-12)).item()


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


# The model against transformers


def theirs(config: GPTConfig, model: GPT) -> "GPT2LMHeadModel":
    """transformers' model with the weights of ours."""
    from transformers import GPT2Config, GPT2LMHeadModel  # seconds that collecting the tests does not need

    settings = GPT2Config(
        n_positions=config.block_size,
        vocab_size=config.vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        activation_function=THEIR_ACTIVATION[config.activation],
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        other = GPT2LMHeadModel(settings).eval()
    state = {name: torch.zeros(x.shape) for name, x in other.state_dict().items()}
    state |= {name: x.t() if name.endswith(TURNED) else x for name, x in model.state_dict().items()}
    other.load_state_dict(state, assign=True)
    return other


def assert_equal_to_transformers(config: GPTConfig, b: int, t: int) -> None:
    model = build(config).eval()
    other = theirs(config, model)
    idx = draw_tokens(config, b, t)
    targets = torch.cat((idx[:, 1:], torch.full((b, 1), -1)), dim=1)
    with torch.no_grad():
        expected = other(idx, labels=idx)
        torch.testing.assert_close(all_logits(model, idx), expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(idx), expected.logits[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(idx, targets, scale=1 / (b * (t - 1))), expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [{}, {"bias": False}, {"n_head": 1, "n_layer": 1}, {"n_embd": 60, "n_head": 5}])
def test_logits_and_loss_are_those_of_transformers(shape: dict[str, Any], activation: str) -> None:
    assert_equal_to_transformers(tiny(**shape, activation=activation), 2, 17)


def test_gpt2_124m_is_that_of_transformers() -> None:
    assert_equal_to_transformers(GPTConfig(vocab_size=50_257, activation="gelu_tanh"), 1, 12)


def test_the_two_activations_differ() -> None:
    idx = draw_tokens(tiny(), 2, 9)
    exact, approximate = (all_logits(build(tiny(activation=kind)), idx) for kind in ("gelu", "gelu_tanh"))
    assert 1e-6 < (exact - approximate).abs().max() < 1e-2


# Names, configuration, initialisation


def test_names_and_shapes_are_those_of_nanogpt() -> None:
    state = GPT(tiny(n_layer=1)).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "transformer.wte.weight": (67, 24),
        "transformer.wpe.weight": (32, 24),
        "transformer.h.0.ln_1.weight": (24,),
        "transformer.h.0.ln_1.bias": (24,),
        "transformer.h.0.attn.c_attn.weight": (72, 24),
        "transformer.h.0.attn.c_attn.bias": (72,),
        "transformer.h.0.attn.c_proj.weight": (24, 24),
        "transformer.h.0.attn.c_proj.bias": (24,),
        "transformer.h.0.ln_2.weight": (24,),
        "transformer.h.0.ln_2.bias": (24,),
        "transformer.h.0.mlp.c_fc.weight": (96, 24),
        "transformer.h.0.mlp.c_fc.bias": (96,),
        "transformer.h.0.mlp.c_proj.weight": (24, 96),
        "transformer.h.0.mlp.c_proj.bias": (24,),
        "transformer.ln_f.weight": (24,),
        "transformer.ln_f.bias": (24,),
        "lm_head.weight": (67, 24),
    }
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    without = GPT(tiny(n_layer=1, bias=False)).state_dict()
    assert list(without) == [name for name in state if not name.endswith(".bias")]


def test_model_args_are_nanogpts_and_come_back() -> None:
    args = tiny(dropout=0.1, bias=False).as_nanogpt()
    assert args == {
        "block_size": 32, "vocab_size": 67, "n_layer": 3, "n_head": 2, "n_embd": 24, "dropout": 0.1, "bias": False,
    }  # fmt: skip
    assert GPTConfig.from_nanogpt(args) == tiny(dropout=0.1, bias=False)
    assert GPTConfig.from_nanogpt({**args, "dropout": 0}).dropout == 0
    approximate = tiny(activation="gelu_tanh")
    assert approximate.as_nanogpt()["activation"] == "gelu_tanh"
    assert GPTConfig.from_nanogpt(approximate.as_nanogpt()) == approximate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": None}, "n_layer in model_args must be of type int, got None"),
        ({"n_head": "2"}, "n_head in model_args must be of type int, got '2'"),
        ({"bias": 1}, "bias in model_args must be of type bool, got 1"),
        ({"n_embd": True}, "n_embd in model_args must be of type int, got True"),
        ({"rotary": True}, "model_args has 'rotary', which is none of block_size, vocab_size"),
        ({"n_head": 5}, "model_args cannot be used: n_embd=24 must be a multiple of n_head=5"),
        ({"activation": "relu"}, "activation must be gelu or gelu_tanh, got 'relu'"),
        ({"dropout": 1.5}, "dropout must be at least 0 and below 1, got 1.5"),
    ],
)
def test_broken_model_args_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        GPTConfig.from_nanogpt({**tiny().as_nanogpt(), **change})


def test_missing_model_args_are_refused() -> None:
    args = tiny().as_nanogpt()
    del args["bias"]
    with pytest.raises(CheckpointError, match="model_args lacks bias"):
        GPTConfig.from_nanogpt(args)


@pytest.mark.parametrize("size", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_sizes_start_at_one(size: str) -> None:
    with pytest.raises(ConfigError, match=f"{size} must be at least 1, got 0"):
        tiny(**{size: 0})


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(tiny(n_layer=8, n_embd=128, vocab_size=1000, block_size=256)).init_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.03 * expected, name
        else:
            assert torch.all(parameter == (0 if name.endswith(".bias") else 1)), name


def test_parameters_and_flops_of_gpt2_124m() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    # v c + t c + 12 (12 c^2 + 2 c) + c with c = 768, t = 1024, v = 50304: no biases, two gains a block and the last.
    assert model.count_parameters() == 50_304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert model.count_parameters(positions=False) == 123_587_328
    assert model.flops_per_token(1024) == 6 * 123_587_328 + 12 * 12 * 768 * 1024


def test_cropped_positions_leave_short_sequences_alone() -> None:
    model = build(tiny())
    idx = draw_tokens(tiny(), 2, 10)
    before = all_logits(model, idx)
    model.crop_block_size(10)
    assert model.config == tiny(block_size=10)
    assert model.state_dict()["transformer.wpe.weight"].shape == (10, 24)
    assert torch.equal(all_logits(model, idx), before)
    with pytest.raises(ConfigError, match="a sequence of 11 tokens is longer than block_size=10"):
        model(draw_tokens(tiny(), 1, 11))
    with pytest.raises(ConfigError, match="block_size=11 is longer than the model's 10 positions"):
        model.crop_block_size(11)


# The optimizer


def test_matrices_decay_and_vectors_do_not_in_nanogpts_order() -> None:
    model = GPT(tiny(n_layer=1))
    groups = build_optimizer(model.parameters(), weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    block = "transformer.h.0."
    assert [names[p] for p in groups[0]["params"]] == [
        "transformer.wte.weight", "transformer.wpe.weight",
        f"{block}attn.c_attn.weight", f"{block}attn.c_proj.weight",
        f"{block}mlp.c_fc.weight", f"{block}mlp.c_proj.weight",
    ]  # fmt: skip
    assert [names[p] for p in groups[1]["params"]] == [
        name for name in names.values() if "ln_" in name or "bias" in name
    ]
    assert [(g["weight_decay"], g["lr"], g["betas"]) for g in groups] == [
        (0.1, 1e-3, (0.9, 0.95)),
        (0.0, 1e-3, (0.9, 0.95)),
    ]


def test_moments_exist_at_once_and_steps_are_adamws() -> None:
    models = [build(tiny()) for _ in range(2)]
    ours = build_optimizer(models[0].parameters(), weight_decay=0.1, learning_rate=1e-2, betas=(0.9, 0.95))
    assert all(len(ours.state[p]) == 3 for p in models[0].parameters())
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in models[1].parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in models[1].parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for _ in range(3):
        for ours_p, plain_p in zip(*(m.parameters() for m in models), strict=True):
            ours_p.grad = torch.randn_like(ours_p)
            plain_p.grad = ours_p.grad.clone()
        ours.step()
        plain.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert ours.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    ours.load_state_dict(plain.state_dict())


# Attention


def torch_attention(qkv: Tensor, n_head: int) -> Tensor:
    b, t, packed = qkv.shape
    q, k, v = (z.view(b, t, n_head, -1).transpose(1, 2) for z in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, packed // 3)


def attend(kernel: Callable[[Tensor, int], Tensor], qkv: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Output of 3 heads and, for a weighted sum of it, the gradient."""
    leaf = qkv.clone().requires_grad_()
    out = kernel(leaf, 3)
    return out.detach(), gradients((out * weights.to(out.dtype)).sum(), [leaf])[0]


@pytest.mark.parametrize("small_groups", [False, True])
@pytest.mark.parametrize("t", [1, 5, 127, 128, 129, 300])
def test_tiled_attention_errs_about_as_much_as_torchs(
    t: int, small_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_groups:
        monkeypatch.setattr(attention, "_TILE_SCORES", 4 * 128 * t)
    generator = torch.Generator().manual_seed(t)
    qkv = torch.randn(2, t, 3 * 3 * 16, generator=generator).bfloat16()
    weights = torch.randn(2, t, 3 * 16, generator=generator).bfloat16()
    truth = attend(torch_attention, qkv.double(), weights)
    for ours, plain, true in zip(
        attend(causal_attention, qkv, weights), attend(torch_attention, qkv, weights), truth, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, true) <= 2.5 * relative_error(plain, true) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_ignores_the_future(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 200, 3 * 3 * 16, generator=generator).to(dtype)
    before = causal_attention(qkv, 3)
    for j in (1, 63, 128, 199):
        changed = qkv.clone()
        changed[:, j:] = torch.randn(1, 200 - j, 3 * 3 * 16, generator=generator).to(dtype) * 10
        after = causal_attention(changed, 3)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_ignores_the_future(dtype: str) -> None:
    model, idx = build(tiny()), draw_tokens(tiny(), 2, 32)
    changed = idx.clone()
    changed[:, 20] = (idx[:, 20] + 1) % 67
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        before, after = all_logits(model, idx), all_logits(model, changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], atol=1e-6, rtol=0)
    assert all((after[:, j] - before[:, j]).abs().max() > 1e-3 for j in range(20, 32))


@pytest.mark.parametrize("prompt", [1, 5])
def test_cached_logits_are_the_cacheless_ones(prompt: int) -> None:
    model, idx = build(tiny()).eval(), draw_tokens(tiny(), 2, 32)
    cache = KeyValueCache(3)
    with torch.no_grad():
        expected = all_logits(model, idx)
        start = 0
        for stop in (prompt, *range(prompt + 1, 20), 23, 32):
            logits = model(idx[:, start:stop], cache=cache)
            torch.testing.assert_close(logits, expected[:, stop - 1], atol=1e-5, rtol=1e-5)
            assert cache.length == stop
            start = stop
        with pytest.raises(ConfigError, match="a sequence of 33 tokens is longer than block_size=32"):
            model(idx[:, :1], cache=cache)


# Activation checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_checkpointed_blocks_give_the_same_gradients_bit_for_bit(blocks: int, dropout: float) -> None:
    results = []
    for checkpointed in (0, blocks):
        model = build(tiny(dropout=dropout), checkpointed_blocks=checkpointed)
        torch.manual_seed(5)
        loss = model(draw_tokens(tiny(), 2, 20), draw_tokens(tiny(), 2, 20, seed=2))
        results.append([loss, *gradients(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Layers that hold less


def layer_functions(
    bias: bool,
) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], list[nn.Module]]]:
    """For each function of `linear`: itself, torch's own composition of it, and the modules in it."""
    torch.manual_seed(3)
    norm, layer = LayerNorm(48, bias), nn.Linear(48, 40, bias=bias)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(48) * 0.1)
    return {
        "norm": (lambda x: norm_linear(x, norm, layer), lambda x: layer(norm(x)), [norm, layer]),
        "gelu": (lambda x: gelu_linear(x, layer), lambda x: layer(F.gelu(x)), [layer]),
        "gelu_tanh": (
            lambda x: gelu_linear(x, layer, approximate="tanh"),
            lambda x: layer(F.gelu(x, approximate="tanh")),
            [layer],
        ),
        "plain": (lambda x: plain_linear(x, layer), layer, [layer]),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["norm", "gelu", "gelu_tanh", "plain"])
def test_layers_that_hold_less_err_about_as_much_as_autocast(kind: str, bias: bool) -> None:
    ours, plain, modules = layer_functions(bias)[kind]
    parameters = [p for module in modules for p in module.parameters()]
    x = torch.randn(5, 60, 48)
    if kind != "norm":
        x = x.bfloat16()  # what the layer before it gives under autocast
    weights = torch.randn(5, 60, 40).bfloat16()

    def run(function: Callable[[Tensor], Tensor], x: Tensor, low: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = function(leaf)
        assert out.dtype == (torch.bfloat16 if low else torch.float32)
        return [out.detach(), *gradients((out * weights.to(out.dtype)).sum(), [leaf, *parameters])]

    truth = run(plain, x.float(), low=False)
    found, autocast = run(ours, x, low=True), run(plain, x, low=True)
    assert [g.dtype for g in found] == [g.dtype for g in autocast]
    for a, b, true in zip(found, autocast, truth, strict=True):
        assert relative_error(a, true) <= 1.5 * relative_error(b, true) + 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_the_whole_model_errs_about_as_much_as_autocast(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(bias=bias, block_size=160, n_embd=48)
    model, idx = build(config), draw_tokens(config, 2, 160)

    def run(low: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(idx, idx.roll(-1, 1), scale=1 / 320)
        return torch.cat([g.flatten() for g in gradients(loss, list(model.parameters()))])

    truth, ours = run(low=False), run(low=True)
    monkeypatch.setattr(linear, "_recomputes", lambda x: False)
    monkeypatch.setattr(
        "tightfit.models.model.causal_attention", lambda qkv, n_head, dropout: torch_attention(qkv, n_head)
    )
    assert relative_error(ours, truth) <= 1.5 * relative_error(run(low=True), truth)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("checkpointed", "budget"), [(0, 1.0), (2, 1.0), (0, 0.3)])
def test_compiled_in_parts_it_is_the_same_and_its_blocks_share_their_code(
    checkpointed: int, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters  # the compiler takes seconds to load, which collecting does not need
    from torch._functorch import config as functorch

    kernels = "aot_eager_decomp_partition"  # Inductor's graphs without its kernels, which take 20 s more
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=kernels))
    config = tiny(n_layer=5)
    model = build(config, loss="full", checkpointed_blocks=checkpointed)
    idx = draw_tokens(config, 2, 32)

    def run() -> Tensor:
        loss = model(idx, idx.roll(-1, 1), scale=1 / 64)
        return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients(loss, list(model.parameters())))])

    plain, cache = run(), KeyValueCache(config.n_layer)
    continued = model(idx[:, :1], cache=cache).detach()
    torch._dynamo.reset()
    counters["stats"].clear()
    model.compile_parts()
    with functorch.patch(activation_memory_budget=budget):
        assert relative_error(run(), plain) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2  # a block, the loss
    assert torch.equal(model(idx[:, :1], cache=KeyValueCache(config.n_layer)), continued)
    assert counters["stats"]["unique_graphs"] == 2  # what continues a text is not compiled
