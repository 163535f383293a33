"""Memory that a script gives up and takes again below its tensors, and scripts of several threads."""

import json
from pathlib import Path

import pytest
from plays import played
from warm import in_process

from tightfit.units import MIB

CARD = """
import json
import tightfit
gpu = tightfit.VirtualGPU("RTX 3060 12GB", memory_bytes=1 << 30, context_bytes=0)
gpu.__enter__()
import torch
def held(): return torch.cuda.memory_allocated() / 2**20
"""


KEPT_WORKSPACES = CARD.replace("context_bytes=0", 'context_bytes=0, torch="2.13"')
"""A card whose torch keeps cuBLAS's workspaces: 2.15 gives them back."""


def on_card(script: str, card: str = CARD) -> list[str]:
    """Lines that a script prints on a card of 1 GiB."""
    return in_process(card + script).splitlines()


# Storages that are resized


def test_resized_storages_free_and_take() -> None:
    printed = on_card("""
t = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
view = t.view(2, -1)
address = t.data_ptr()
print(t.untyped_storage().resize_(0) is t.untyped_storage(), held(), view.untyped_storage().nbytes(), t.data_ptr())
view.untyped_storage().resize_(8 << 20)
print(held(), t.untyped_storage().nbytes(), t.data_ptr() == address, (view + 1).shape)
torch.cuda.reset_peak_memory_stats()
t.untyped_storage().resize_(4 << 20)  # the new block is there before the old one goes
print(held(), torch.cuda.max_memory_allocated() / 2**20)
t.untyped_storage().resize_(4 << 20)  # also for the size that it has
print(held(), torch.cuda.max_memory_allocated() / 2**20)
del t, view
print(held())
""")
    assert printed == [
        "True 0.0 0 0",
        f"8.0 {8 * MIB} True torch.Size([2, 4194304])",
        "4.0 12.0",
        "4.0 12.0",
        "0.0",
    ]


def test_empty_host_and_typed_storages_resize_too() -> None:
    printed = on_card("""
empty = torch.empty(0, device="cuda")
empty.untyped_storage().resize_(16 << 20)
print(held())
torch.ops.inductor.resize_storage_bytes_(empty, 0)  # what a compiled FSDP2 graph calls
print(held(), empty.untyped_storage().nbytes())
empty.resize_(1 << 20)
print(held())
empty._typed_storage()._resize_(0)
print(held())
host = torch.ones(4)
host.untyped_storage().resize_(0)
print(held(), host.untyped_storage().nbytes())
""")
    assert printed == ["16.0", "0.0 0", "4.0", "0.0", "0.0 0"]


def test_grown_tensors_hold_both_blocks_for_a_moment() -> None:
    printed = on_card("""
t = torch.empty(4 << 18, device="cuda")
t.resize_(8 << 18)
print(held(), torch.cuda.max_memory_allocated() / 2**20)
""")
    assert printed == ["8.0 12.0"]


def test_resized_storages_forget_their_values() -> None:
    printed = on_card("""
ones = torch.ones(4, device="cuda")
ones.untyped_storage().resize_(0)
ones.untyped_storage().resize_(16)
ones.sum().item()
gpu.__exit__(None, None, None)
print([each.what for each in gpu.findings().made_up_values])
""")
    assert printed == ["['a value read from the device']"]


def test_copies_to_the_card_take_the_memory_format_that_is_asked_for() -> None:
    """As on the processor, whose real copies these are compared with, also in inference mode."""
    printed = on_card("""
import contextlib
flat, solid = torch.zeros(2, 3, 8, 8), torch.zeros(1, 2, 3, 4, 5)
for mode in (contextlib.nullcontext, torch.inference_mode):
    with mode():
        for x, form in ((flat, torch.channels_last), (solid, torch.channels_last_3d), (flat, torch.contiguous_format)):
            for words in ({}, {"dtype": torch.float16}):
                there = x.to("cuda", memory_format=form, **words)
                here = x.to("cpu", memory_format=form, copy=True, **words)
                print(there.stride() == here.stride(), there.dtype == here.dtype, there.device)
""")
    assert printed == ["True True cuda:0"] * 12


def test_resized_memory_belongs_to_the_line_that_resized(tmp_path: Path) -> None:
    script = tmp_path / "resizes.py"
    script.write_text("""import torch
weight = torch.nn.Linear(1024, 1024, bias=False).cuda().weight
weight.untyped_storage().resize_(0)
weight.untyped_storage().resize_(4 << 20)
weight.untyped_storage().resize_(2 << 30)
""")
    found = played(["--gpu", "RTX 3060 12GB", "--memory", "1GiB", "--context", 0, script])
    assert found.outcome == "out_of_memory"
    assert (found.failure.line, found.failure.requested_bytes) == (5, 2 << 30)
    (largest,) = found.largest
    assert (largest.line, largest.shape, largest.category) == (4, (1024, 1024), "parameters")
    assert largest.operator == "UntypedStorage.resize_"


def test_fsdp2_keeps_only_shards_between_passes() -> None:
    """Eight matrices of 4 MiB on two cards: 16 MiB of shards, 16 of gradients, and workspaces of 8.125 MiB each."""
    printed = in_process(
        'import os; os.environ["WORLD_SIZE"] = "2"'
        + KEPT_WORKSPACES
        + """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("nccl")
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(8)]).cuda()
for layer in model:
    fully_shard(layer)
fully_shard(model)
x = torch.randn(8, 1024, device="cuda")
with torch.no_grad():
    model(x)
print(held())
model(x).sum().backward()
print(held())
gpu.__exit__(None, None, None)
print(json.dumps(gpu.findings().categories))
"""
    ).splitlines()
    after_forward, after_backward = map(float, printed[:2])
    assert 16 + 8.125 < after_forward < 16 + 8.125 + 0.1
    assert 32 + 2 * 8.125 < after_backward < 32 + 2 * 8.125 + 0.1
    categories = json.loads(printed[2])  # at the peak, in backward: one gathered matrix beside the shards
    assert categories["parameters"] == 20 * MIB
    assert categories["activations"] < MIB


def test_equal_views_at_other_places_know_where_they_begin() -> None:
    """A call is remembered without its index; its result's offset follows from it, except where it is given."""
    printed = on_card("""
rows = torch.arange(24, device="cuda").view(4, 6).float()
for t in range(4):
    views = rows[t], rows[:, t], rows[t : t + 2][-1], rows[-1][t:], rows[t].chunk(3)[1], rows[t].expand(3, 6)[1]
    given = rows[t].as_strided((2,), (1,)), rows[t].as_strided((2,), (1,), 3), rows[t].view(torch.uint8)
    print([each.storage_offset() for each in (*views, *given)], len(views[3]))
try:
    rows[4]
except IndexError:
    print(rows[5:9].shape)
""")
    assert printed == [
        *(f"{[6 * t, t, 6 * min(t + 1, 3), 18 + t, 6 * t + 2, 6 * t, 6 * t, 3, 24 * t]} {6 - t}" for t in range(4)),
        "torch.Size([0, 6])",
    ]


def test_attention_that_is_not_compiled_makes_all_scores() -> None:
    """Eight heads of 1024 x 1024: 16 MiB in bfloat16 and 32 MiB in float32, which flex_attention uses for them."""
    printed = on_card("""
from torch.nn.attention.flex_attention import flex_attention
q, k, v = (torch.randn(2, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
before = torch.cuda.memory_allocated()
out = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j))
print((torch.cuda.max_memory_allocated() - before) // 2**20 >= 48, held() < 20)
out.sum().backward()
print(q.grad.dtype, (torch.cuda.max_memory_allocated() - before) // 2**20 >= 96)
one = torch.ones(1 << 20, device="cuda")
print(torch.cond(one.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (one,)).shape)
""")
    assert printed == ["True True", "torch.bfloat16 True", "torch.Size([1048576])"]


# Several threads


def test_weights_loaded_by_threads_belong_to_setup() -> None:
    printed = on_card("""
import threading
from concurrent.futures import ThreadPoolExecutor
def load(number):
    return torch.nn.Parameter(torch.ones(64, 64).to("cuda"), requires_grad=False)
with ThreadPoolExecutor(4) as pool:
    weights = list(pool.map(load, range(500)))
print(held())
class Loader(threading.Thread):
    def run(self):
        self.weight = load(0)
loader = Loader()
loader.start()
loader.join()
print(held(), loader.weight.device, "run" in loader.__dict__)
del weights, loader
print(held())
gpu.__exit__(None, None, None)
print(list(gpu.findings().phases))
""")
    assert printed == [f"{500 * 16 / 1024}", f"{501 * 16 / 1024} cuda:0 False", "0.0", "['setup']"]


def test_a_thread_that_runs_out_of_memory_ends_the_script(tmp_path: Path) -> None:
    """Also where the main thread waits for what the thread would have made."""
    script = tmp_path / "prefetch.py"
    script.write_text("""import queue, threading, torch
batches = queue.Queue()
def produce():
    for _ in range(100):
        batches.put(torch.zeros(1 << 28, device="cuda"))
threading.Thread(target=produce, daemon=True).start()
kept = [batches.get() for _ in range(100)]
""")
    found = played(["--gpu", "RTX 3060 12GB", script])
    assert (found.outcome, found.failure and found.failure.line) == ("out_of_memory", 5)


def test_functions_of_atexit_belong_to_the_script(tmp_path: Path) -> None:
    script = tmp_path / "report.py"
    script.write_text("""import atexit, sys, torch
@atexit.register
def report():
    torch.zeros(1 << 32, device="cuda")
atexit.unregister(atexit.register(lambda: torch.zeros(1 << 33, device="cuda")))
torch.zeros(1 << 20, device="cuda")
sys.exit()
""")
    found = played(["--gpu", "RTX 3060 12GB", script])
    assert (found.outcome, found.failure and found.failure.line) == ("out_of_memory", 4)


def test_threads_that_train_empty_the_cache_and_free_at_once() -> None:
    """Replicas in four threads, while a fifth empties the cache: no byte is lost."""
    printed = on_card("""
import sys
import threading
import time
sys.setswitchinterval(1e-5)
done = threading.Event()
def clear():
    while not done.is_set():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        time.sleep(1e-4)
def train(number):
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256)).cuda()
    for _ in range(5):
        model(torch.ones(64, 256, device="cuda")).square().mean().backward()
clearing = threading.Thread(target=clear)
clearing.start()
threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
done.set()
clearing.join()
import gc
gc.collect()
torch._C._cuda_clearCublasWorkspaces()
torch.cuda.empty_cache()
print(held(), torch.cuda.memory_reserved())
gpu.__exit__(None, None, None)
print(*gpu.findings().phases)
""")
    assert printed[0] == "0.0 0"
    assert set(printed[1].split()) == {"setup", "forward", "loss", "backward", "optimizer"}  # made after backward


def test_each_thread_has_a_cublas_workspace_and_leaves_it_to_the_next() -> None:
    printed = on_card(
        """
import threading
def product():
    with torch.no_grad():
        x = torch.ones(8, 8, device="cuda")
        x @ x
def in_thread():
    thread = threading.Thread(target=product)
    thread.start()
    thread.join()
found = []
for run in (product, product, in_thread, in_thread):
    run()
    found.append(held())
print([after / found[0] for after in found])
""",
        KEPT_WORKSPACES,
    )
    assert printed == ["[1.0, 1.0, 2.0, 2.0]"]


def test_steps_that_repeat_in_a_thread_end_the_script(tmp_path: Path) -> None:
    script = tmp_path / "thread.py"
    script.write_text("""import threading, torch
def train():
    model = torch.nn.Linear(8, 8).cuda()
    optimizer = torch.optim.SGD(model.parameters())
    for _ in range(100):
        model(torch.ones(2, 8, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
thread = threading.Thread(target=train)
thread.start()
thread.join()
torch.ones(2, device="cuda")
raise AssertionError("not ended")
""")
    found = played(["--gpu", "RTX 3060 12GB", script])
    assert found.outcome == "fits"
    assert found.stopped_because.startswith("steps 2 to 4 made the same allocations")


def test_a_step_in_a_function_leaves_nothing_behind(tmp_path: Path) -> None:
    script = tmp_path / "function.py"
    script.write_text("""import gc, torch
gc.disable()
model = torch.nn.Linear(1024, 1024, device="cuda")
optimizer = torch.optim.SGD(model.parameters())
def step():
    activations = model(torch.ones(4096, 1024, device="cuda"))
    activations.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
held = set()
for _ in range(3):
    step()
    held.add(torch.cuda.memory_allocated())
assert len(held) == 1, held
""")
    assert played(["--gpu", "RTX 3060 12GB", script]).outcome == "fits"


# Values and operators that only a dispatch mode would change


def test_autograd_writes_into_zeros_in_place_as_on_a_card() -> None:
    """The torch implementation of sparsemax on an RTX 3090: 10.25 tensors of its input's size at the peak, and 36 KiB.

    Measured by Liger-Kernel's authors (82.03515625 MiB, 2048 x 1024 float32). Under a dispatch mode, torch would take
    one more tensor in the backward of sort.
    """
    printed = on_card("""
def sparsemax(x):
    ordered, places = torch.sort(x, dim=1, descending=True)
    sums = torch.cumsum(ordered, dim=1)
    steps = torch.arange(1, x.size(1) + 1, device="cuda", dtype=x.dtype).view(1, -1)
    bound = 1 + steps * ordered
    support = bound > sums
    count = support.sum(dim=1, keepdim=True).clamp(min=1)
    total = (ordered * support).sum(dim=1, keepdim=True)
    tau = (total - 1) / count
    return torch.clamp(x - tau, min=0)
x = torch.randn(2048, 1024, device="cuda")
upstream = torch.randn_like(x)
x.requires_grad_(True)
for _ in range(2):
    torch.cuda.reset_peak_memory_stats()
    y = sparsemax(x)
    y.backward(upstream, retain_graph=True)
    del y
print(torch.cuda.max_memory_allocated())
weights = torch.randn(4, 256, 4096, device="cuda", requires_grad=True)
chosen = torch.zeros(4, 256, 1, dtype=torch.int64, device="cuda")
loss = weights.gather(-1, chosen).sum()
before = held()
torch.cuda.reset_peak_memory_stats()
loss.backward()
print(torch.cuda.max_memory_allocated() / 2**20 - before < 17)  # one tensor of 16 MiB, not two
""")
    assert printed == ["86020096", "True"]


def test_tensors_can_be_made_and_compared_within_a_backward_function() -> None:
    printed = on_card("""
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, grad):
        made = torch.tensor(1.0, device=grad.device), torch.as_tensor([1.0], device="cuda"), grad.new_tensor([1.0])
        print({each.device.type for each in made}, torch.equal(grad, made[0]))
        return 2 * grad
x = torch.ones((), device="cuda", requires_grad=True)
Double.apply(x).backward()  # its gradient is 1
Double.apply(x).backward(torch.randn_like(x))
""")
    assert printed == ["{'cuda'} True", "{'cuda'} False"]


def test_the_torch_on_the_card_decides_about_workspaces() -> None:
    """Blackwell's cuBLAS workspace is Hopper's from torch 2.12 on."""
    script = 'x = torch.ones(8, 8, device="cuda"); x @ x; print(held())'
    blackwell = CARD.replace('"RTX 3060 12GB"', '"RTX 5090"')
    for version, mib in (("2.8.0+cu128", 8.125), ("2.12", 32)):
        chosen = blackwell.replace("context_bytes=0", f"context_bytes=0, torch={version!r}")
        (printed,) = in_process(chosen + script).splitlines()
        assert float(printed) - mib < 0.01


def test_a_call_that_is_made_again_gives_the_same_kind_of_result() -> None:
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("RTX 3090", context_bytes=0):
            import torch
            x = torch.ones(4, 6, device="cuda")
            def layout(t):
                return t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_inference(), t.requires_grad
            calls = {
                "made": lambda: x.exp(),
                "several": lambda: torch.aminmax(x, dim=1),
                "view": lambda: x[1:, 2],
                "in place": lambda: x.add_(1),
                "a list": lambda: torch._foreach_mul([x, x[0]], 2.0),
                "in place on a list": lambda: torch._foreach_mul_([x, x[0]], 2.0),
                "attention": lambda: torch.nn.functional.scaled_dot_product_attention(*[x.half().view(1, 1, 4, 6)] * 3),
                "empty": lambda: x[:0].t(),
                "another dtype": lambda: x.to(torch.float64) + 1,
            }
            for name, call in calls.items():
                one, other = ([out] if isinstance(out, torch.Tensor) else out or [] for out in (call(), call()))
                assert list(map(layout, one)) == list(map(layout, other)), name
                for first, second in zip(one, other):
                    shares = first.untyped_storage()._cdata == second.untyped_storage()._cdata
                    assert shares == (name in ("view", "in place", "in place on a list", "empty")), name
            assert x.add_(1) is x
            with torch.inference_mode():
                old, new = [x[0] for _ in range(2)], [x.clone()[0] for _ in range(2)]
            print([t.is_inference() for t in old + new])
            before = torch.cuda.memory_allocated()
            kept = [x.exp() for _ in range(5)]
            print((torch.cuda.memory_allocated() - before) // 512, "blocks")
            w = torch.ones(6, 6, device="cuda", requires_grad=True)
            for _ in range(2):
                y = (x @ w).sigmoid()
                y.sum().backward()
                y = (x @ w).sigmoid()
                y.data_ptr(), y.mul_(2)
                try:
                    y.sum().backward()
                except RuntimeError as error:
                    print("modified by an inplace operation" in str(error), w.grad.shape)
    """)
    assert said.splitlines() == ["[False, False, True, True]", "5 blocks", *["True torch.Size([6, 6])"] * 2]


# Builds of torch with and without CUDA


def test_eager_code_runs_no_decomposition_of_a_compiler() -> None:
    """Upsampling is one kernel, whichever kernels this build of torch has, and in inference mode too."""
    printed = on_card("""
import torch.nn.functional as F
found = []
for mode in (torch.no_grad, torch.inference_mode):
    with mode():
        images = torch.zeros(4, 8, 64, 64, device="cuda", dtype=torch.float16)
        for kind in ("nearest", "nearest-exact", "bilinear"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            larger = F.interpolate(images, scale_factor=2, mode=kind)
            found.append((torch.cuda.max_memory_allocated() - before) / larger.nbytes)
print(*found)
""")
    assert printed == ["1.0 1.0 1.0 1.0 1.0 1.0"]


@pytest.mark.parametrize(("card", "layouts"), [("RTX 3060 12GB", "True True False"), ("T4", "True False False")])
def test_convolutions_keep_channels_last_as_cudnn_does(card: str, layouts: str) -> None:
    script = """
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    images = torch.zeros(2, 8, 16, 16, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.zeros(4, 8, 3, 3, device="cuda", dtype=dtype)
    found.append(torch.nn.functional.conv2d(images, weight).is_contiguous(memory_format=torch.channels_last))
print(*found)
"""
    assert on_card(script, CARD.replace("RTX 3060 12GB", card)) == [layouts]


def test_no_setting_asks_the_driver() -> None:
    printed = on_card("""
settings = torch.backends.cuda
plans = settings.cufft_plan_cache
plans.max_size = 8
plans.clear()
print(plans.size, plans.max_size, settings.preferred_linalg_library("cusolver").name)
q = torch.zeros(1, 2, 64, 64, device="cuda", dtype=torch.float16)
masked = settings.SDPAParams(q, q, q, q[0], 0.0, False, False)
causal = settings.SDPAParams(q, q, q, None, 0.0, True, False)
for call in (causal, masked):
    print(settings.can_use_flash_attention(call), settings.can_use_efficient_attention(call))
print(settings.is_flash_attention_available(), torch._C._accelerator_getDefaultGenerator(0).device)
torch.accelerator.memory.empty_host_cache() if hasattr(torch.accelerator.memory, "empty_host_cache") else None
start, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
print(type(start.elapsed_time(end)).__name__, q[0, 0, 0].numpy(force=True).shape)
""")
    assert printed == ["0 8 Cusolver", "True True", "False True", "True cuda", "float (64,)"]


def test_grids_are_sampled_by_cudnn() -> None:
    """A build of torch with CUDA takes this operator for `grid_sample(..., align_corners=True)`."""
    printed = on_card("""
images = torch.zeros(2, 3, 8, 8, device="cuda", requires_grad=True)
grid = torch.zeros(2, 4, 5, 2, device="cuda", requires_grad=True)
sampled = torch.cudnn_grid_sampler(images, grid)
sampled.sum().backward()
print(*sampled.shape, images.grad.shape == images.shape, grid.grad.shape == grid.shape)
""")
    assert printed == ["2 3 4 5 True True"]


def test_batches_are_normalised_by_cudnn() -> None:
    """cuDNN keeps two statistics of 512 bytes in training and none in evaluation; in bfloat16 it has no kernel."""
    printed = on_card("""
weight, bias = (torch.ones(64, device="cuda", requires_grad=True) for _ in range(2))
mean, variance = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
def kept(dtype, training):
    images = torch.randn(8, 64, 32, 32, device="cuda", dtype=dtype, requires_grad=True)
    before = torch.cuda.memory_allocated()
    out = torch.nn.functional.batch_norm(images, mean, variance, weight, bias, training)
    return torch.cuda.memory_allocated() - before - out.nbytes, out
print(*(kept(dtype, training)[0] for dtype in (torch.float16, torch.bfloat16) for training in (True, False)))
out = kept(torch.float16, True)[1]
before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
out.sum().backward()  # its gradient is one number at all places, which cuDNN's kernel wants laid out
print((torch.cuda.max_memory_allocated() - before) // out.nbytes)
images = torch.randn(2, 64, 4, 4, device="cuda")
print(*torch.nn.InstanceNorm2d(64, affine=True).cuda()(images).shape, *torch.nn.functional.instance_norm(images).shape)
try:
    torch.nn.functional.batch_norm(images, mean[:8], variance, weight, bias, True)
except RuntimeError as error:
    print(error)
""")
    assert printed == ["1024 0 1024 1024", "2", "2 64 4 4 2 64 4 4", "running_mean should contain 64 elements not 8"]


def test_profilers_see_the_host() -> None:
    printed = on_card("""
x = torch.ones(4, device="cuda")
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
    x + x
print(any(event.key == "aten::add" for event in profiler.key_averages()))
with torch.autograd.profiler.emit_nvtx():
    x + x
""")
    assert printed == ["True"]
