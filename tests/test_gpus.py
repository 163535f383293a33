"""Which card a name means, what is known of it, and what a CUDA context takes there."""

import csv
from importlib.resources import files

import pytest

from tightfit.errors import DeviceError
from tightfit.gpus import GPU, UNKNOWN_SM_COUNT, all_gpus, context_bytes, find_gpu, resolve_gpu
from tightfit.units import GIB, MIB
from tightfit.wording import Words

ROWS = {
    table: list(csv.DictReader(files("tightfit").joinpath(table).read_text(encoding="utf-8").splitlines()))
    for table in ("gpus.csv", "contexts.csv")
}
BY_NAME = {row["name"]: row for row in ROWS["gpus.csv"]}
NO_LINUX_TOTAL = {
    "GeForce RTX 2070", "GeForce RTX 2080", "GeForce RTX 3050 8GB", "GeForce RTX 3060 8GB", "GeForce RTX 3070 Ti",
    "NVIDIA A2", "NVIDIA A16 (one of four)", "GeForce RTX 4060 Ti 16GB", "GeForce RTX 4070 SUPER",
    "NVIDIA GH200 480GB (96GB HBM3)", "GeForce RTX 5070", "GeForce RTX 5070 Ti", "GeForce RTX 3050 Laptop 4GB",
}  # fmt: skip


def card(text: str) -> GPU:
    return resolve_gpu(text)[0]


# The tables against themselves


def test_every_row_is_a_card_with_sources() -> None:
    assert len(all_gpus()) == len(BY_NAME) == 70
    for gpu in all_gpus():
        assert gpu.source, gpu.name
        assert gpu.memory_source, gpu.name
        assert gpu.sm_count >= 10
        assert 100 < (gpu.bandwidth_gbps or 0) <= 8000


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_memory_lies_below_the_advertised_size_and_above_nine_tenths_of_it(gpu: GPU) -> None:
    advertised = int(BY_NAME[gpu.name]["memory_marketing_gb"]) * GIB
    assert 0.9 * advertised < gpu.memory_bytes_min <= gpu.memory_bytes < advertised
    assert gpu.planning_bytes == gpu.memory_bytes_min
    assert gpu.memory_is_estimate == (gpu.name in NO_LINUX_TOTAL)


def test_estimated_memory_by_hand() -> None:
    # of the 8 GB GeForce cards the 4060 Ti reported least: 8,185,184,256 of 8,589,934,592 bytes
    assert card("RTX 3070 Ti").memory_bytes == 8_185_184_256 // MIB * MIB
    # of what nvidia-smi shows, the 5060 Ti reports least: 16,610,492,416 bytes of 16,311 MiB
    assert card("A2").memory_bytes == int(15_356 * MIB * 16_610_492_416 / (16_311 * MIB)) // MIB * MIB


@pytest.mark.parametrize("row", ROWS["gpus.csv"], ids=lambda row: row["name"])
def test_tensor_rates_follow_the_formula(row: dict[str, str]) -> None:
    if not row["tflops_basis"].startswith("formula"):
        assert row["tflops_basis"] in (
            "no tensor cores",
            "vendor print",
            "table value (torchtitan, nanochat); not derived",
        )
        return
    per_clock = float(row["fp16_dense_tflops"]) * 1e6 / (2 * int(row["sm_count"]) * float(row["boost_mhz"]))
    assert min(abs(per_clock / fma - 1) for fma in (256, 512, 1024, 2048)) < 0.005
    assert row["bf16_dense_tflops"] in ("", row["fp16_dense_tflops"])


@pytest.mark.parametrize("row", ROWS["gpus.csv"], ids=lambda row: row["name"])
def test_float32_rates_follow_the_formula(row: dict[str, str]) -> None:
    if row["arch"] == "Hopper" or row["name"] == "NVIDIA A10G":
        pytest.skip("the table's clock is that of its tensor cores")
    cores = 64 if row["arch"] in ("Volta", "Turing") or row["compute_capability"] in ("6.0", "8.0") else 128
    expected = cores * 2 * int(row["sm_count"]) * float(row["boost_mhz"]) / 1e6
    assert float(row["fp32_tflops"]) == pytest.approx(expected, rel=0.015)


def test_native_bf16_agrees_with_the_table() -> None:
    for gpu in all_gpus():
        row = BY_NAME[gpu.name]
        assert gpu.native_bf16 == (row["bf16_support"] == "native") == (gpu.bf16_tflops is not None), gpu.name


def test_every_reason_of_the_table_has_its_words() -> None:
    reasons = {row["common_reason"] for row in ROWS["gpus.csv"] if row["common_rank"]}
    assert reasons - {""} <= Words("tightfit.wording.gpus", "en").table("reason").keys()


# Names


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("change", [str, str.lower, str.upper, lambda name: name.replace(" ", "_"), "  {}\n".format])
def test_every_exact_name_is_itself(gpu: GPU, change) -> None:  # type: ignore[no-untyped-def]
    found, notes = resolve_gpu(change(gpu.name))
    assert found == gpu
    assert not [note for note in notes if "could also be" in note]
    assert find_gpu(gpu.name) == gpu


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # as drivers print them
        ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "GeForce RTX 3060 Laptop"),
        ("NVIDIA GeForce RTX 3050 Ti Laptop GPU", "GeForce RTX 3050 Ti Laptop"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 (SXM)"),
        ("NVIDIA H200", "NVIDIA H200 (SXM)"),
        ("NVIDIA A16", "NVIDIA A16 (one of four)"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB (96GB HBM3)"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "NVIDIA RTX PRO 6000 Blackwell Workstation"),
        ("Tesla T4", "Tesla T4"),
        ("NVIDIA A10G", "NVIDIA A10G"),
        # as people write them
        ("RTX 3060 12GB", "GeForce RTX 3060 12GB"),
        ("rtx3060-12g", "GeForce RTX 3060 12GB"),
        ("3060 (8 GB)", "GeForce RTX 3060 8GB"),
        ("RTX3060Ti", "GeForce RTX 3060 Ti"),
        ("3060 laptop", "GeForce RTX 3060 Laptop"),
        ("3070 Mobile", "GeForce RTX 3070 Laptop"),
        ("4070TiSuper", "GeForce RTX 4070 Ti SUPER"),
        ("4070 super", "GeForce RTX 4070 SUPER"),
        ("4090", "GeForce RTX 4090"),
        ("RTX 4090 24GiB", "GeForce RTX 4090"),
        ("5090", "GeForce RTX 5090"),
        ("5060ti 16g", "GeForce RTX 5060 Ti 16GB"),
        ("1080ti", "GeForce GTX 1080 Ti"),
        ("GTX-1060", "GeForce GTX 1060 6GB"),
        ("A100 80GB PCIe", "NVIDIA A100 80GB PCIe"),
        ("a100-pcie", "NVIDIA A100-PCIE-40GB"),
        ("a100 80gb", "NVIDIA A100-SXM4-80GB"),
        ("A100 SXM 40GB", "NVIDIA A100-SXM4-40GB"),
        ("Tesla A100-40G", "NVIDIA A100-SXM4-40GB"),
        ("H100 SXM5", "NVIDIA H100 80GB HBM3 (SXM)"),
        ("h100 pcie", "NVIDIA H100 PCIe"),
        ("h200", "NVIDIA H200 (SXM)"),
        ("V100 32GB", "Tesla V100-SXM2-32GB"),
        ("v100 pcie", "Tesla V100-PCIE-16GB"),
        ("T4", "Tesla T4"),
        ("l4", "NVIDIA L4"),
        ("L40s 48GB", "NVIDIA L40S"),
        ("P100", "Tesla P100-PCIE-16GB"),
        ("a6000", "NVIDIA RTX A6000"),
        ("6000 Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("rtx pro 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation"),
        ("A10", "NVIDIA A10"),
        ("B200", "NVIDIA B200"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert card(text).name == name


@pytest.mark.parametrize(
    ("text", "name", "others"),
    [
        ("RTX 3060", "GeForce RTX 3060 12GB", ["GeForce RTX 3060 8GB"]),
        ("NVIDIA GeForce RTX 3080", "GeForce RTX 3080 10GB", ["GeForce RTX 3080 12GB"]),
        ("3050", "GeForce RTX 3050 8GB", ["GeForce RTX 3050 6GB"]),
        ("4060 Ti", "GeForce RTX 4060 Ti 8GB", ["GeForce RTX 4060 Ti 16GB"]),
        (
            "A100",
            "NVIDIA A100-SXM4-40GB",
            ["NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"],
        ),
        ("a100 80gb", "NVIDIA A100-SXM4-80GB", ["NVIDIA A100 80GB PCIe"]),
        ("V100", "Tesla V100-SXM2-16GB", ["Tesla V100-PCIE-16GB", "Tesla V100-SXM2-32GB"]),
        ("V100 SXM", "Tesla V100-SXM2-16GB", ["Tesla V100-SXM2-32GB"]),
        ("H100", "NVIDIA H100 80GB HBM3 (SXM)", ["NVIDIA H100 PCIe"]),
    ],
)
def test_an_ambiguous_name_says_what_was_taken_and_what_else_it_could_be(
    text: str, name: str, others: list[str]
) -> None:
    gpu, [note, *_] = resolve_gpu(text)
    assert gpu.name == name
    assert note.startswith(f"{text!r} is taken as {name} (")
    assert note.endswith(f"; it could also be {', '.join(others)}")
    assert find_gpu(text) is None


def test_a_shortened_name_is_a_card_of_that_name_or_unknown() -> None:
    for gpu in all_gpus():
        words = gpu.name.split()
        for length in range(1, len(words)):
            text = " ".join(words[:length])
            try:
                assert set(text.split()) <= set(card(text).name.replace("-", " ").split())
            except DeviceError:
                assert find_gpu(text) is None


def test_a_size_that_the_table_lacks_is_said() -> None:
    gpu, [note] = resolve_gpu("5060 Ti")
    assert gpu.name == "GeForce RTX 5060 Ti 16GB"
    assert note == "'5060 Ti' is taken as GeForce RTX 5060 Ti 16GB; it is also made with 8 GB"
    assert resolve_gpu("5060 Ti 16GB")[1] == []


def test_an_estimated_size_is_said() -> None:
    [note] = resolve_gpu("4070 SUPER")[1]
    assert note.startswith("no Linux total of GeForce RTX 4070 SUPER is known; 11.62 GiB is an estimate from 12 GB")
    assert note.endswith("--memory replaces it")


@pytest.mark.parametrize(
    "text",
    [
        "RTX 3060 16GB", "5060 Ti 8GB", "GTX 3060", "RTX T4", "3060 S", "RTX 4090 D", "4090 Ti", "Quadro RTX 6000",
        "RTX 6000", "RTX A6000 Ada", "H100 NVL", "V100S", "A1000", "RTX", "Ti", "Laptop", "80GB", "MI300X", "306",
        "30600", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "3060 or 3070", "Apple M3", "P100-SXM2-16GB",
        "RTX PRO 6000 Max-Q",
    ],
)  # fmt: skip
def test_an_unknown_name_is_never_another_card(text: str) -> None:
    assert find_gpu(text) is None
    with pytest.raises(DeviceError) as caught:
        resolve_gpu(text)
    message = str(caught.value)
    assert message.startswith(f"{text!r} is not in the table of GPUs")
    assert message.endswith("or give --memory (like 12GiB) and --capability (like 8.6) to describe it")
    assert "\n" not in message


def test_the_error_names_the_nearest_cards() -> None:
    with pytest.raises(DeviceError, match=r"nearest names: .*GeForce RTX 4090"):
        resolve_gpu("RTX 4090 D")
    with pytest.raises(DeviceError, match=r"nearest names: .*GeForce RTX 3060 12GB"):
        resolve_gpu("RTX 3060 16GB")
    with pytest.raises(DeviceError, match=r"^'abacus' is not in the table of GPUs; write"):
        resolve_gpu("abacus")


@pytest.mark.parametrize("text", ["", "   ", "\n", "a\x1b[31m", "x" * 101, "3060" + " " * 200 + "Ti", "9" * 10**6])
def test_hostile_names_are_refused_in_one_short_line(text: str) -> None:
    assert find_gpu(text) is None
    with pytest.raises(DeviceError) as caught:
        resolve_gpu(text)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text", ["🚀", "rtx 🚀", "显卡", "٣٠٦٠", "../../etc/passwd", "3060'; drop", "(.*)", "%s", "{}"]
)
def test_odd_names_are_unknown(text: str) -> None:
    with pytest.raises(DeviceError, match="is not in the table of GPUs"):
        resolve_gpu(text)


def test_control_characters_are_never_printed() -> None:
    gpu, notes = resolve_gpu("3060\x1b[\x00")
    assert gpu.name == "GeForce RTX 3060 12GB"
    assert all(note.isprintable() for note in notes)


def test_full_width_digits_are_digits() -> None:
    assert card("ＲＴＸ ４０９０").name == "GeForce RTX 4090"


# What the user says of the card


def test_memory_replaces_that_of_the_table() -> None:
    gpu, [note] = resolve_gpu("4090", memory_bytes=20 * GIB)
    assert gpu.memory_bytes == gpu.memory_bytes_min == gpu.planning_bytes == 20 * GIB
    assert note == "GeForce RTX 4090 is planned with 20.00 GiB as given; the least reported on Linux is 23.52 GiB"
    assert card("4090").memory_bytes == 25_262_096_384
    estimated, [note] = resolve_gpu("4070 SUPER", memory_bytes=12 * GIB)
    assert not estimated.memory_is_estimate
    assert "its estimate is 11.62 GiB" in note


@pytest.mark.parametrize(
    ("text", "given", "name"),
    [
        ("NVIDIA GeForce RTX 3060", {"memory_bytes": 12_622_168_064}, "GeForce RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060", {"memory_bytes": 8_240_000_000}, "GeForce RTX 3060 8GB"),
        ("NVIDIA GeForce RTX 3080", {"sm_count": 70}, "GeForce RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 3050", {"sm_count": 18}, "GeForce RTX 3050 6GB"),
        ("A100", {"memory_bytes": 85 * 10**9}, "NVIDIA A100-SXM4-80GB"),
        ("3060", {"memory_bytes": 6 * GIB}, "GeForce RTX 3060 12GB"),  # fits neither: the common one, limited
        ("3060", {"sm_count": 99}, "GeForce RTX 3060 12GB"),
    ],
)
def test_memory_or_sms_tell_cards_of_one_name_apart(text: str, given: dict[str, int], name: str) -> None:
    gpu, notes = resolve_gpu(text, **given)  # type: ignore[arg-type]
    assert gpu.name == name
    assert notes[0].startswith(f"{text!r} is taken as {name}")
    assert gpu.memory_bytes == given.get("memory_bytes", gpu.memory_bytes)


def test_an_sm_count_replaces_that_of_the_table_and_a_capability_must_agree() -> None:
    gpu, [note] = resolve_gpu("A10", sm_count=36, capability=(8, 6))
    assert gpu.sm_count == 36
    assert note == "NVIDIA A10 is planned with 36 SMs as given, not the 72 of the table"
    with pytest.raises(DeviceError, match=r"^NVIDIA A10 has compute capability 8\.6, not 7\.0; leave"):
        resolve_gpu("A10", capability=(7, 0))


def test_an_unknown_card_can_be_described() -> None:
    gpu, notes = resolve_gpu("  RTX  7090 🚀", memory_bytes=48 * GIB, capability=(13, 0), sm_count=200)
    assert (gpu.name, gpu.arch, gpu.capability, gpu.sm_count) == ("RTX 7090 🚀", "unknown", (13, 0), 200)
    assert gpu.planning_bytes == gpu.memory_bytes == 48 * GIB
    assert gpu.native_bf16
    assert gpu.peak_flops("bfloat16") is None
    assert notes == ["'RTX 7090 🚀' is not in the table of GPUs: it is planned as described, and its speed is unknown"]
    assert context_bytes(gpu)[0] > 0

    gpu, notes = resolve_gpu("L40", memory_bytes=48 * GIB, capability=(8, 9))
    assert (gpu.arch, gpu.sm_count) == ("Ada", UNKNOWN_SM_COUNT)
    assert notes[1] == "its SM count is not given and taken as 56, near the median of the known cards"


def test_half_a_description_asks_for_the_other_half() -> None:
    with pytest.raises(DeviceError, match=r"or give --capability \(like 8\.6\) to describe it$"):
        resolve_gpu("L40", memory_bytes=48 * GIB)
    with pytest.raises(DeviceError, match=r"or give --memory \(like 12GiB\) to describe it$"):
        resolve_gpu("L40", capability=(8, 9))


@pytest.mark.parametrize("text", ["4090", "L40"])
def test_impossible_descriptions_are_refused(text: str) -> None:
    with pytest.raises(DeviceError, match=r"^memory_bytes of '.*' must be at least 1, got -5$"):
        resolve_gpu(text, memory_bytes=-5, capability=(8, 9))
    with pytest.raises(DeviceError, match=r"^sm_count of '.*' must be at least 1, got 0$"):
        resolve_gpu(text, memory_bytes=GIB, capability=(8, 9), sm_count=0)


def test_a_gpu_checks_itself() -> None:
    facts = {"name": "x", "arch": "x", "sm_count": 1}
    with pytest.raises(DeviceError, match=r"^memory_bytes_min of 'x' must be at most memory_bytes=1, got 2$"):
        GPU(**facts, capability=(8, 6), memory_bytes=1, memory_bytes_min=2)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"^compute capability of 'x' must be like 8\.6, got 0\.5$"):
        GPU(**facts, capability=(0, 5), memory_bytes=2, memory_bytes_min=2)  # type: ignore[arg-type]


def test_peak_rates() -> None:
    assert card("3090").peak_flops("bfloat16") == 71.2e12
    assert card("T4").peak_flops("bfloat16") is None
    assert card("T4").peak_flops("float16") == pytest.approx(65.1e12)
    assert card("P100").peak_flops("float32") == 9.3e12


# CUDA contexts


def test_context_rows_are_sourced_and_plausible() -> None:
    rows = ROWS["contexts.csv"]
    measured = [row for row in rows if row["kind"] != "kernels"]
    assert len(measured) >= 20
    assert len({row["arch"] for row in rows}) == 7
    for row in rows:
        assert "https://" in row["source"] or "given to this project" in row["source"]
        assert row["kind"] in ("context", "context and kernels", "kernels")
        assert row["notes"]
        if row["gpu"] in BY_NAME:
            known = BY_NAME[row["gpu"]]
            assert (row["sm_count"], row["compute_capability"]) == (known["sm_count"], known["compute_capability"])
    for row in measured:
        per_sm = int(row["bytes"]) / int(row["sm_count"]) / MIB
        if float(row["cuda_version"]) < 11.7:
            assert 10 < per_sm < 20
        elif row["for_estimates"] == "yes":
            assert 3 <= per_sm < 6.1


def test_the_context_of_a_measured_chip() -> None:
    used, why = context_bytes(card("RTX 3060 12GB"))
    # 7.04 GiB in use, 6.78 GiB allocated, 224.90 MiB reserved; both GiB figures are rounded to 0.01 GiB
    assert used == pytest.approx(((7.04 - 6.78) * 1024 - 224.90 + 0.01 * 1024) * MIB, abs=2)
    assert why.startswith(
        "51.58 MiB for the CUDA context and kernels, measured on GeForce RTX 3060 12GB with CUDA 12: "
    )
    # 256 MiB read before any kernel was loaded, 18 MiB that kernels added elsewhere, 1 MiB of rounding
    assert context_bytes(card("3090"))[0] == (256 + 1 + 18) * MIB
    # the chip counts, not the memory around it
    assert len({context_bytes(card(name))[0] for name in ("A100 40GB", "A100 80GB", "A100 PCIe")}) == 1


def test_the_context_of_another_chip_is_an_estimate_that_says_so() -> None:
    used, why = context_bytes(card("RTX 3080 10GB"))
    low, high = context_bytes(card("A4000"))[0], context_bytes(card("A10"))[0]
    assert used == round(low + (high - low) * (68 - 48) / (72 - 48))
    assert "an estimate for 68 SMs from NVIDIA RTX A4000 (48 SMs, 220.32 MiB) and NVIDIA A10 (72 SMs, " in why
    used, why = context_bytes(card("V100"))  # twice the SMs of the T4, the nearest capability with lazy loading
    assert used == 2 * context_bytes(card("T4"))[0]
    assert "an estimate for 80 SMs from Tesla T4 (40 SMs, 150.86 MiB)" in why


def test_before_lazy_loading_a_context_was_larger() -> None:
    for gpu in all_gpus():
        assert context_bytes(gpu, (11, 6))[0] > context_bytes(gpu, (11, 7))[0], gpu.name
    assert context_bytes(card("2080 Ti"), (10, 1))[0] == 878 * MIB


def test_every_card_has_room_beside_its_context() -> None:
    for gpu in all_gpus():
        used, why = context_bytes(gpu)
        assert 30 * MIB < used < 800 * MIB, gpu.name
        assert used < gpu.planning_bytes / 30, gpu.name
        assert why.count("\n") == 0


@pytest.mark.parametrize(
    "capability", [(5, 2), (6, 1), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0), (20, 0)]
)
def test_an_estimate_never_falls_with_more_sms(capability: tuple[int, int]) -> None:
    # 28 SMs of capability 8.6 is the RTX 3060, whose measurement speaks for that chip only
    counts = [sms for sms in range(1, 250) if (capability, sms) != ((8, 6), 28)]
    sizes = [
        context_bytes(resolve_gpu("x", memory_bytes=GIB, capability=capability, sm_count=sms)[0])[0] for sms in counts
    ]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("small", "large"),
    [("3060 8GB", "3060 12GB"), ("3080 10GB", "3080 12GB"), ("V100 16GB", "V100 32GB"), ("A100 40GB", "A100 80GB"),
     ("4060 Ti 8GB", "4060 Ti 16GB"), ("4090", "5090"), ("H100", "H200")],
)  # fmt: skip
def test_what_fits_the_smaller_card_fits_the_larger(small: str, large: str) -> None:
    rooms = [card(name).planning_bytes - context_bytes(card(name))[0] for name in (small, large)]
    assert rooms[0] < rooms[1]
