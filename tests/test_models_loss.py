"""The loss in every kind and precision: value and gradients against float64, errors next to the plain path's."""

import shutil
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.errors import ConfigError
from tightfit.models import loss as loss_module
from tightfit.models.loss import LossKind, logits_bytes, token_loss

KINDS: list[LossKind] = ["full", "chunked"]
LOW = [torch.bfloat16, torch.float16]
ALL_DTYPES = [torch.float32, *LOW]


class Result(NamedTuple):
    """A loss and its gradients."""

    value: Tensor
    hidden: Tensor
    weight: Tensor


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few rows, slabs narrower than the vocabulary and tiles of 3 rows, at the sizes of these tests."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 4000)
    monkeypatch.setattr(loss_module, "_SLAB_ROWS", 50)
    monkeypatch.setattr(loss_module, "_CPU_TILE_BYTES", 3 * 131 * 4)


def draw(n: int = 67, c: int = 24, v: int = 131, *, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets of a model that is neither certain nor uniform."""
    generator = torch.Generator().manual_seed(n + v)
    hidden = torch.randn(n, c, generator=generator)
    weight = torch.randn(v, c, generator=generator) * 0.3
    targets = torch.randint(v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -1
    return hidden, weight, targets


def run(
    inputs: tuple[Tensor, Tensor, Tensor],
    kind: LossKind,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    behind: float = 1.0,
    autocast: torch.dtype | None = None,
) -> Result:
    """The loss of these inputs in `dtype`, times `behind`."""
    hidden, weight = (x.to(dtype).requires_grad_() for x in inputs[:2])
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value = token_loss(hidden, weight, inputs[2], scale=scale, kind=kind)
    grads = torch.autograd.grad(value * behind, (hidden, weight))
    return Result(value.detach(), *grads)


def truth(inputs: tuple[Tensor, Tensor, Tensor], factor: float = 1.0, dtype: torch.dtype = torch.float64) -> Result:
    """Written out in float64 from inputs rounded to `dtype`: -log softmax(hidden weight^T)[target], summed."""
    hidden, weight = (x.to(dtype).double().requires_grad_() for x in inputs[:2])
    logits = hidden @ weight.t()
    counted = inputs[2] >= 0
    picked = logits.gather(1, inputs[2].clamp_min(0).unsqueeze(1)).squeeze(1)
    value = ((logits.logsumexp(1) - picked) * counted).sum()
    grads = torch.autograd.grad(value * factor, (hidden, weight))
    return Result(value.detach(), *grads)


def errors(found: Result, true: Result) -> list[float]:
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in zip(found, true, strict=True)]


def assert_exact(found: Result, true: Result) -> None:
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-5)


def assert_no_worse(found: Result, plain: Result, true: Result) -> None:
    """At most 1.5 times the error of the plain low-precision path, in value and both gradients."""
    for name, ours, theirs in zip(Result._fields, errors(found, true), errors(plain, true), strict=True):
        assert ours <= 1.5 * theirs + 1e-6, (name, ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "v"), [(67, 131), (1, 131), (1, 1), (128, 64), (5, 2)])
def test_float32_is_exact(kind: LossKind, n: int, v: int) -> None:
    inputs = draw(n, v=v)
    assert_exact(run(inputs, kind), truth(inputs))


def test_worked_by_hand() -> None:
    # Logits (0, ln 3): probabilities 1/4 and 3/4. Target 1 costs ln 4/3; the gradient of logits is (1/4, -1/4).
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0]]).log()
    for kind in KINDS:
        value, grad_hidden, grad_weight = run((hidden, weight, torch.tensor([1])), kind)
        torch.testing.assert_close(value, torch.log(torch.tensor(4 / 3)))
        torch.testing.assert_close(grad_weight, torch.tensor([[0.25], [-0.25]]))
        torch.testing.assert_close(grad_hidden, -0.25 * torch.log(torch.tensor([[3.0]])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "behind"), [(1 / 67, 1.0), (1.0, 3.0), (0.25, -3.0)])
def test_scale_within_and_behind(kind: LossKind, scale: float, behind: float) -> None:
    inputs = draw()
    true = truth(inputs, scale * behind)
    assert_exact(run(inputs, kind, scale=scale, behind=behind), true._replace(value=true.value * scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_targets_all_ignored_cost_nothing(kind: LossKind, dtype: torch.dtype) -> None:
    found = run(draw(ignored=2.0), kind, dtype=dtype, scale=0.5)
    assert all(torch.all(x == 0) for x in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_ignored_rows_get_no_gradient(kind: LossKind, dtype: torch.dtype) -> None:
    inputs = draw()
    found = run(inputs, kind, dtype=dtype)
    assert torch.all(found.hidden[inputs[2] == -1] == 0)
    assert torch.all(found.hidden[inputs[2] != -1].abs().sum(1) > 0)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(67, 24, 131), (300, 64, 1000), (7, 24, 131)])
@pytest.mark.parametrize("scale", [1.0, 1 / 300])
def test_chunked_errs_no_more_than_full(dtype: torch.dtype, shape: tuple[int, int, int], scale: float) -> None:
    inputs = draw(*shape)
    true = truth(inputs, scale, dtype)
    true = true._replace(value=true.value * scale)
    found, plain = (run(inputs, kind, dtype=dtype, scale=scale) for kind in ("chunked", "full"))
    assert found.value.dtype == torch.float32
    assert found.hidden.dtype == found.weight.dtype == dtype
    assert_no_worse(found, plain, true)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.usefixtures("small_chunks")
def test_many_chunks_err_no_more_than_full(dtype: torch.dtype) -> None:
    inputs = draw()
    assert_no_worse(run(inputs, "chunked", dtype=dtype), run(inputs, "full", dtype=dtype), truth(inputs, 1.0, dtype))


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw()
    one = run(inputs, "chunked")
    for chunk_bytes, slab, tile in [(4000, 50, 1), (4 * 131 * 9, 131, 4 * 131 * 4), (1, 1, 1)]:
        monkeypatch.setattr(loss_module, "_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(loss_module, "_SLAB_ROWS", slab)
        monkeypatch.setattr(loss_module, "_CPU_TILE_BYTES", tile)
        for a, b in zip(run(inputs, "chunked"), one, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("autocast", LOW)
def test_under_autocast(autocast: torch.dtype) -> None:
    inputs = draw(200, 48, 700)
    found, plain = (run(inputs, kind, autocast=autocast) for kind in ("chunked", "full"))
    assert found.value.dtype == found.hidden.dtype == found.weight.dtype == torch.float32
    assert_no_worse(found, plain, truth(inputs))


def test_float16_keeps_gradients_that_a_grad_scaler_rescues() -> None:
    """A mean over many tokens, behind it a GradScaler's factor: the small factor must not underflow alone."""
    inputs = draw(200, 48, 700)
    scale, behind = 2.0**-17, 2.0**16
    found, plain = (
        run(inputs, kind, autocast=torch.float16, scale=scale, behind=behind) for kind in ("chunked", "full")
    )
    true = truth(inputs, scale * behind)
    assert_no_worse(found, plain, true._replace(value=true.value * scale))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind: LossKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_add_weight_grad", lambda *args, **kwargs: pytest.fail("made a gradient"))
    hidden, weight, targets = draw()
    weight.requires_grad_()
    with torch.no_grad():
        value = token_loss(hidden, weight, targets, kind=kind)
    assert not value.requires_grad
    torch.testing.assert_close(value.double(), truth((hidden, weight, targets)).value, atol=0, rtol=1e-6)
    with torch.inference_mode():
        assert token_loss(hidden, weight, targets, kind=kind) == value


@pytest.mark.parametrize("kind", KINDS)
def test_one_input_may_be_frozen(kind: LossKind) -> None:
    inputs = draw()
    true = truth(inputs)
    for index, expected in ((0, true.hidden), (1, true.weight)):
        leaves = [inputs[0].clone(), inputs[1].clone()]
        leaves[index].requires_grad_()
        token_loss(leaves[0], leaves[1], inputs[2], kind=kind).backward()
        grad = leaves[index].grad
        assert grad is not None
        torch.testing.assert_close(grad.double(), expected, atol=2e-6, rtol=2e-5)
        assert leaves[1 - index].grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate(kind: LossKind) -> None:
    """Two backward passes through one graph, then another loss: nothing is added into what a graph still holds."""
    hidden, weight, targets = draw()
    hidden.requires_grad_()
    weight.requires_grad_()
    value = token_loss(hidden, weight, targets, kind=kind)
    value.backward(retain_graph=True)
    value.backward()
    token_loss(hidden, weight, targets, kind=kind).backward()
    true = truth((hidden.detach(), weight.detach(), targets), 3.0)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert_exact(Result(value.detach(), hidden.grad, weight.grad), true)


def test_auto_keeps_small_logits_and_chunks_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw()
    assert logits_bytes(inputs[0], inputs[1]) == 67 * 131 * 4
    calls: list[int] = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kw: (calls.append(1), cross_entropy(*args, **kw))[1])
    monkeypatch.setattr(loss_module, "_FULL_LOGITS_BYTES", 67 * 131 * 4)
    small = run(inputs, "auto")
    assert calls == [1]
    monkeypatch.setattr(loss_module, "_FULL_LOGITS_BYTES", 67 * 131 * 4 - 1)
    large = run(inputs, "auto")
    assert calls == [1]
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_liger_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"^loss=liger (needs liger-kernel; pip install|runs on CUDA, not on cpu)"):
        run(draw(), "liger")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for torch.compile")
@pytest.mark.filterwarnings("ignore:.*(script_method|should not be instantiated):DeprecationWarning")
@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of two tiles and two slabs, in one graph."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 8 * 131 * 4)
    monkeypatch.setattr(loss_module, "_SLAB_ROWS", 100)
    monkeypatch.setattr(loss_module, "_CPU_TILE_BYTES", 4 * 131 * 4)
    inputs = draw(20)
    torch.compiler.reset()
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])

    @torch.compile(fullgraph=True)
    def compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return token_loss(hidden * 1.0, weight, targets, scale=0.5, kind="chunked")

    value = compiled(hidden, weight, inputs[2])
    grads = torch.autograd.grad(value * 3, (hidden, weight))
    true = truth(inputs, 1.5)
    assert_exact(Result(value.detach(), *grads), true._replace(value=true.value * 0.5))
