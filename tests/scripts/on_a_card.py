"""What programs do on a card, one function each; prints a JSON object of the failures by name."""

import copy
import gc
import json
import pickle
import subprocess
import sys
import tempfile
import traceback

import torch
import torch.distributions as distributions
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

MIB = 2**20


def error_of(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("no error")


def data_of_anything():
    plain = torch.ones(4)
    plain.data = plain.to("cuda")
    assert plain.device.type == "cuda"
    assert (plain[None] + 1).shape == (1, 4)
    layer = nn.Linear(8, 8).cuda()
    layer.weight.grad, layer.weight.mark = torch.zeros_like(layer.weight), "kept"
    layer.weight.data = torch.zeros(8, 8, device="cuda")
    assert layer.weight.grad is not None
    assert layer.weight.mark == "kept"
    layer.weight.data = layer.weight.data.cpu()
    assert layer.weight.device.type == "cpu"


def streams_and_events():
    side = torch.cuda.Stream(device="cuda", priority=-1)
    torch.cuda.current_stream(device=torch.device("cuda")).wait_stream(side)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(side):
        start.record(stream=side)
        assert torch.cuda.current_stream() == side
    end.record()
    assert start.elapsed_time(end_event=end) > 0
    assert torch.cuda.default_stream(device=0) != side
    assert isinstance(torch.cuda.stream(side), torch.cuda.StreamContext)


def positions_that_differ():
    x = torch.randn(4, 50, device="cuda")
    best = x.topk(5, dim=1).indices
    for each in (best[0], best.cpu()[1], x.argsort(dim=0)[:, 3], torch.multinomial(x.softmax(1), 3)[2]):
        assert len(set(each.tolist())) == len(each)
    assert sorted(torch.randperm(6, device="cuda").tolist()) == [0, 1, 2, 3, 4, 5]
    assert int(best[0, 0]) != int(best[0, 1])
    assert 48 // best.cpu().numpy()[0, 0] > 0


def old_names():
    assert torch.cuda.FloatTensor(2, 3).shape == (2, 3)
    assert torch.cuda.LongTensor([1, 2]).dtype == torch.int64
    x = torch.ones(2).type("torch.cuda.HalfTensor")
    assert isinstance(x, torch.cuda.HalfTensor)
    assert not isinstance(x, torch.cuda.FloatTensor)
    assert x.type(torch.FloatTensor).device.type == "cpu"
    torch.set_default_tensor_type("torch.cuda.FloatTensor")
    plain = torch.ones(2, device="cpu")
    made = [torch.Tensor([1e10]), torch.Tensor(3, 4), torch.Tensor(plain), torch.FloatTensor([1.0]), torch.zeros(2)]
    torch.set_default_tensor_type(torch.FloatTensor)
    made += [torch.Tensor([1.0]), torch.zeros(2)]
    assert [each.device.type for each in made] == ["cuda", "cuda", "cpu", "cpu", "cuda", "cpu", "cpu"]


def pinned_and_pickled():
    assert torch.tensor(3, pin_memory=True).cuda(non_blocking=True).shape == ()
    weight = nn.Parameter(torch.randn(3, 4, device="cuda"))
    again = pickle.loads(pickle.dumps({"w": weight}))["w"]
    assert isinstance(again, nn.Parameter)
    assert again.shape == (3, 4)
    assert again.is_cuda
    assert copy.copy(weight).shape == (3, 4)
    assert nn.Linear(2, 2).cuda().share_memory().weight.is_shared()


def default_device():
    torch.set_default_device("cuda")
    try:
        loss = nn.Linear(8, 8)(torch.randn(2, 8)).mean()
        assert f"{loss:.4f}" == "10.0000"
        assert loss.is_cuda
        assert torch.tensor([1, 2]).is_cuda
        assert int(torch.ones(3).sum()) == 3
    finally:
        torch.set_default_device(None)


def second_card():
    for ask in (
        lambda: torch.ones(2, device="cuda:1"),
        lambda: torch.ones(2).to("cuda:1"),
        lambda: torch.cuda.set_device(1),
    ):
        assert "invalid device ordinal" in error_of(RuntimeError, ask)


def graphs():
    layer, x = nn.Linear(64, 64).cuda(), torch.randn(8, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.memory_reserved()
    with torch.cuda.graph(graph):
        y = layer(x)
        assert torch.cuda.is_current_stream_capturing()
    graph.replay()
    assert torch.cuda.memory_reserved() >= before + 2 * MIB, "the private pool takes a segment of its own"
    made = torch.cuda.make_graphed_callables(nn.Linear(64, 64).cuda(), (x,))
    made(x).sum().backward()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        y = x + y
    assert y.shape == (8, 64)


def one_card_of_many():
    model = nn.DataParallel(nn.Linear(16, 16)).cuda()
    model(torch.randn(4, 16).cuda()).sum().backward()
    assert model.module.weight.grad.shape == (16, 16)
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()
    assert torch.cuda.nccl.version() > (2, 0)


def smi():
    torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert "RTX 3090" in subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True).stdout
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    name, total = subprocess.check_output(words, text=True).strip().split(", ")
    assert name == "NVIDIA GeForce RTX 3090"
    assert int(total) == torch.cuda.mem_get_info()[1] // MIB
    pynvml = __import__("pynvml")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    assert pynvml.nvmlDeviceGetName(handle) == name
    assert pynvml.nvmlDeviceGetCount() == 1
    free, total = torch.cuda.mem_get_info()
    assert pynvml.nvmlDeviceGetMemoryInfo(handle).used == total - free


def recurrent():
    for kind, options in (
        (nn.LSTM, {"bidirectional": True, "batch_first": True}),
        (nn.GRU, {}),
        (nn.RNN, {"bias": False}),
    ):
        model = kind(16, 32, 2, **options)
        expected = model(torch.randn(4, 7, 16))[0].shape
        model.cuda()
        assert len({weight.untyped_storage()._cdata for weight in model.parameters()}) == 1, "cuDNN's one buffer"
        out = model(torch.randn(4, 7, 16, device="cuda"))[0]
        out.sum().backward()
        assert out.shape == expected
        assert all(weight.grad.shape == weight.shape for weight in model.parameters())
    packed = pack_padded_sequence(torch.randn(9, 4, 16, device="cuda"), torch.tensor([9, 7, 5, 2]))
    out, lengths = pad_packed_sequence(nn.LSTM(16, 16).cuda()(packed)[0])
    assert out.shape == (9, 4, 16)
    assert lengths.tolist() == [9, 7, 5, 2]


def losses_and_layouts():
    scores = torch.randn(50, 4, 20, device="cuda", requires_grad=True)
    targets, lengths = torch.randint(1, 20, (4, 10), device="cuda"), torch.full((4,), 10)
    nn.functional.ctc_loss(scores.log_softmax(2), targets, torch.full((4,), 50), lengths).backward()
    assert scores.grad.shape == scores.shape
    sparse = torch.sparse_coo_tensor([[0, 1, 1], [2, 0, 2]], [1.0, 2.0, 3.0], (2, 3)).cuda()
    assert torch.sparse.mm(sparse, torch.randn(3, 5, device="cuda")).shape == (2, 5)
    assert sparse.to_dense().shape == (2, 3)
    assert sparse.coalesce().values().shape == (3,)
    table = nn.Embedding(100, 8, sparse=True).cuda()
    optimizer = torch.optim.SparseAdam(table.parameters())
    table(torch.zeros(8, dtype=torch.long, device="cuda")).sum().backward()
    optimizer.step()
    ragged = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged).to("cuda")
    assert nn.Linear(8, 2).cuda()(ragged).values().shape == (8, 2)
    rounded = torch.randn(3, device="cuda", requires_grad=True)
    torch.fake_quantize_per_tensor_affine(rounded, 0.1, 0, -128, 127).sum().backward()


def values_hold():
    x, y = torch.rand(8, 3, 64, 64, device="cuda"), torch.randn(4000, 30, device="cuda")
    assert 0 <= x.min() <= x.mean() <= x.max() < 1
    assert y.min() <= y.max()
    assert (y > 0).sum() + (y <= 0).sum() == y.numel()
    ids = torch.randint(5, 10, (3000, 40), device="cuda")
    assert 5 <= ids.min() <= ids.max() < 10
    assert 0 <= y.argmax() < y.numel()
    assert torch.isfinite(y).all()
    assert not torch.isnan(y).any()
    labels = torch.randint(0, 30, (4000,), device="cuda")
    losses = {nn.functional.cross_entropy(y, labels).item() for _ in range(3)}
    assert losses == {0.5}, "a loss that falls would look measured"
    for made in (
        distributions.Categorical(logits=y),
        distributions.Normal(y, y.exp()),
        distributions.Bernoulli(logits=y),
        distributions.OneHotCategorical(logits=y),
        distributions.Dirichlet(y.exp()),
    ):
        made.log_prob(made.sample())


def unknown_operator():
    torch.library.define("cases::unknown", "(Tensor x) -> Tensor")
    told = error_of(NotImplementedError, lambda: torch.ops.cases.unknown(torch.ones(3, device="cuda")))
    assert "cases::unknown" in told
    assert "on_a_card.py, line" in told
    assert "register_fake" in told
    assert "\n" not in told


def kernels_in_python():
    torch.library.define("cases::twice", "(Tensor x) -> Tensor")
    torch.library.impl("cases::twice", "CUDA", lambda x: x * 2)
    assert torch.ops.cases.twice(torch.ones(3, device="cuda")).shape == (3,)
    try:
        import triton
    except ImportError:
        return

    @triton.jit
    def copy_kernel(source, target):
        pass

    source = torch.ones(16, device="cuda")
    gc.collect()  # what other features left in reference cycles
    before = torch.cuda.memory_allocated()
    copy_kernel[(1,)](source, torch.empty_like(source))
    assert torch.cuda.memory_allocated() == before


def caught_failures_keep_nothing():
    def too_large():
        kept = torch.empty(MIB, device="cuda")
        return kept, torch.empty(2**40, device="cuda")

    gc.collect()
    before = torch.cuda.memory_allocated()
    error_of(torch.OutOfMemoryError, too_large)
    assert torch.cuda.memory_allocated() == before
    caught = None
    try:
        (torch.empty(MIB, device="cuda") * 2).expand(2**20, MIB).contiguous()
    except torch.OutOfMemoryError as error:
        caught = error
    assert torch.cuda.memory_allocated() == before, "what an expression made is gone, though the error is kept"
    del caught


def types_are_refused():
    half, single = torch.ones(4, 4, device="cuda").half(), torch.ones(4, 4, device="cuda")
    assert "mat1 and mat2 to have the same dtype, but got: float != c10::Half" in error_of(
        RuntimeError, lambda: single @ half
    )
    assert "must have the same dtype, but got Float and Half" in error_of(
        RuntimeError, lambda: nn.Linear(4, 4).half().cuda()(single)
    )
    assert "Input type (torch.cuda.HalfTensor) and weight type (torch.cuda.FloatTensor)" in error_of(
        RuntimeError, lambda: nn.Conv1d(4, 4, 1, bias=False).cuda()(half[None])
    )
    assert "not implemented for 'Long'" in error_of(RuntimeError, lambda: single.long() @ single.long())
    places = torch.tensor([0, 1], device="cuda")
    assert "same scalar type" in error_of(RuntimeError, lambda: single.index_add_(0, places, half[:2]))
    assert "source and destination dtypes match" in error_of(RuntimeError, lambda: single.__setitem__(places, half[:2]))
    assert "Long or Byte" in error_of(RuntimeError, lambda: nn.functional.cross_entropy(single[:2], places.int()))
    assert "indexed tensor (cpu)" in error_of(RuntimeError, lambda: torch.ones(4)[places])
    with torch.autocast("cuda", dtype=torch.float16):
        assert (single @ half).dtype == torch.float16


def sparse_elements_are_kept():
    gradients = []
    for where in ("cpu", "cuda"):
        layer = nn.Embedding(10, 4, sparse=True, device=where)
        layer(torch.tensor([1, 1, 2, 3], device=where)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        gradient = layer.weight.grad
        turned = torch.sparse_coo_tensor([[0, 1], [1, 2]], [1.0, 2.0], (3, 4), device=where).t()
        gradients.append((gradient._nnz(), gradient._values().shape, gradient.clone()._nnz(), turned._nnz()))
    assert gradients[0] == gradients[1]
    assert gradients[0][0] == 4


def sparse_rows_multiply():
    rows = torch.eye(6)[[0, 2, 2]].to_sparse_csr().cuda()
    dense = torch.ones(6, 4, device="cuda", requires_grad=True)
    for product in (
        rows @ dense,
        torch.sparse.mm(rows, dense),
        torch.addmm(torch.zeros(3, 4, device="cuda"), rows, dense),
    ):
        product.sum().backward()
        assert product.shape == (3, 4)
    assert (dense.grad.shape, rows._nnz(), rows.t().layout) == (dense.shape, 3, torch.sparse_csc)
    assert (rows.values().device.type, rows.to_dense().shape) == ("cuda", (3, 6))


def views_change_in_place():
    numbers = torch.arange(6).reshape(2, 3).cuda()
    numbers.t_().unsqueeze_(0)
    assert numbers.tolist() == [[[0, 3], [1, 4], [2, 5]]]
    assert numbers.transpose_(1, 2).squeeze_(0).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.logsumexp(numbers.float(), 1, out=torch.empty(0, device="cuda")).shape == (2,)
    numbers.t().add_(1)
    assert numbers.tolist() == [[1, 2, 3], [4, 5, 6]]


def pinned_memory_is_known():
    host = torch.ones(4, pin_memory=True)
    assert host.is_pinned()
    assert host[1:].is_pinned()
    assert torch.tensor([1.0], pin_memory=True).is_pinned()
    assert not torch.ones(4).is_pinned()
    assert "only dense CPU tensors" in error_of(RuntimeError, lambda: host.cuda().pin_memory())


def host_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def copies_on_the_host_take_no_memory():
    if sys.platform != "linux":
        return
    layer = nn.Linear(8192, 8192, device="cuda")
    before = host_mib()
    state = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
    rows = [row.clone() for row in state["weight"].split(1000)]
    wide = state["weight"].double()
    again = nn.Parameter(state["weight"], requires_grad=False).clone()
    layer.weight.data.copy_(again)
    assert host_mib() - before < 64
    state["weight"][5000] = 1
    assert [state["weight"].clone()[5000, 7], again[5000, 7], wide[5000, 7], rows[5][0, 7]] == [1, 0, 0, 0]
    assert state["weight"].clone(memory_format=torch.contiguous_format).sum() == 8192
    del layer
    torch.cuda.empty_cache()


def marked_places_bound_a_mask():
    matched = torch.randint(0, 2, (1000,), device="cuda")
    chosen, others = (torch.zeros_like(matched, dtype=torch.uint8) for _ in range(2))
    chosen[torch.where(matched >= 1)[0][:100]] = 1
    others[torch.randperm(1000, device="cuda")[:300]] = 1
    assert [len(each.nonzero()) for each in (chosen, chosen | others, chosen & others)] == [100, 400, 100]
    assert len(torch.where(torch.cat([chosen, others]))[0]) == 400
    chosen.copy_(matched)
    assert len(chosen.nonzero()) == 1000


class Titled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, Titled) and isinstance(args[0], Titled):
            result.__dict__ = copy.deepcopy(args[0].__dict__)
        return result


def kinds_of_tensors_stay():
    picture = torch.ones(2, 8).as_subclass(Titled)
    picture.title = ["a"]
    moved, layer = picture.cuda(), nn.Linear(8, 4).cuda()
    out = layer(moved * 2)
    assert isinstance(out, Titled)
    assert (out.is_cuda, out.title, moved.sum().item()) == (True, ["a"], 16)
    out.sum().backward()
    assert not isinstance(layer.weight.grad, Titled)
    assert type(out.detach().cpu()) is type(picture)
    assert not isinstance(torch.as_subclass(out, torch.Tensor), Titled)
    assert isinstance(torch.as_subclass(layer.weight, Titled).clone(), Titled)
    untitled = out.as_subclass(torch.Tensor)
    untitled.__dict__ = out.__dict__  # as fastai keeps its own
    assert (untitled + 1).is_cuda
    assert untitled.title == ["a"]


def counts_add_up():
    ids = torch.randint(0, 8, (100,), device="cuda")
    assert torch.bincount(ids, minlength=8).sum() == 100
    assert ids.unique(return_counts=True)[1].sum().item() == 100
    window = torch.hann_window(40, device="cuda")
    waves = torch.stft(torch.randn(2, 400, device="cuda"), 40, 10, window=window, return_complex=True)
    assert torch.istft(waves, 40, 10, window=window, length=400).shape == (2, 400)
    times = torch.linspace(0, 1, 100, device="cuda")
    assert all(torch.isclose(time, times).sum() == 1 for time in times)
    assert torch.eye(4, device="cuda").sum() == 4
    eights = torch.ones(16, 16, device="cuda").to(torch.float8_e4m3fn)
    one = torch.tensor(1.0, device="cuda")
    assert "8.9" in error_of(RuntimeError, lambda: torch._scaled_mm(eights, eights.t(), scale_a=one, scale_b=one))


def captures_do_not_wait():
    ones = torch.ones(4, device="cuda")

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ones.sum().item()

    assert "stream is capturing" in error_of(RuntimeError, capture)


def tokens_come_from_a_file():
    tokens = torch.empty(1 << 22, dtype=torch.uint16, pin_memory=True)
    tokens.numpy()[:8] = 7, 50256, 7, 7, 50256, 7, 7, 7
    assert (tokens[:8] == 50256).nonzero().flatten().tolist() == [1, 4]
    ids = tokens[:8].to("cuda", dtype=torch.int32, non_blocking=True)
    assert ids.max() == 50256
    window = torch.tensor(1, dtype=torch.int32, device="cuda")
    window.copy_(3, non_blocking=True)
    assert window.item() == 3


def arguments_by_name():
    class Named(torch.nn.Module):
        def forward(self, x, module=None):
            return x

    layer = torch.nn.Linear(4, 4).cuda()
    scripted = torch.jit.script(layer.eval())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(obj=layer.state_dict(), f=f"{folder}/layer.pt")
        layer.load_state_dict(torch.load(f=f"{folder}/layer.pt", map_location="cuda"))
        torch.jit.save(m=torch.jit.freeze(mod=scripted), f=f"{folder}/scripted.pt")
        torch.jit.load(f=f"{folder}/scripted.pt")
    torch.set_default_tensor_type(t="torch.FloatTensor")
    torch.compile(Named().cuda(), backend="eager")(torch.ones(2, device="cuda"), module=layer)
    error_of(TypeError, lambda: torch.compile(layer, limit_of_mine=4))


FEATURES = [
    *(caught_failures_keep_nothing, types_are_refused, sparse_elements_are_kept, pinned_memory_is_known),
    *(captures_do_not_wait, counts_add_up, positions_that_differ, tokens_come_from_a_file),
    *(sparse_rows_multiply, views_change_in_place, arguments_by_name),
    *(copies_on_the_host_take_no_memory, kinds_of_tensors_stay, marked_places_bound_a_mask),
    *(data_of_anything, streams_and_events, old_names, pinned_and_pickled, default_device, second_card, graphs),
    *(one_card_of_many, smi, recurrent, losses_and_layouts, values_hold, unknown_operator, kernels_in_python),
]


def main():
    failures = {}
    for feature in FEATURES:
        try:
            feature()
            failures[feature.__name__] = ""
        except Exception:
            failures[feature.__name__] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
