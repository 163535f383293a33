"""A log is explained alike, whatever wraps its lines: containers, launchers, loggers, terminals, spreadsheets."""

import json
import re
from collections.abc import Callable

import pytest

from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.render import render
from tightfit.oomlog.log_reader import read_log
from tightfit.wording.diagnosis import words

FRAMES = """Traceback (most recent call last):
  File "/srv/app/finetune.py", line 88, in <module>
    main()
  File "/srv/app/finetune.py", line 61, in main
    scores = torch.matmul(queries, keys.transpose(-2, -1)) / math.sqrt(keys.size(-1))
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. \
GPU 0 has a total capacity of 23.64 GiB of which 1.02 GiB is free. \
Including non-PyTorch memory, this process has 22.60 GiB memory in use. \
Of the allocated memory 21.90 GiB is allocated by PyTorch, and 212.04 MiB is reserved by PyTorch but unallocated."""
"""Frames, code, and a message with all figures."""
KILLED = """Loading the table
Reading rows 0 to 4000000
/var/spool/job.sh: line 12: 4711 Killed                  python prepare.py --rows 40000000"""
REPORTED = """Fine-tuning stops in the second epoch
I use a batch of 8 on a card of 12 GB.
RuntimeError: CUDA out of memory. Tried to allocate 48.00 MiB \
(GPU 0; 11.91 GiB total capacity; \
11.02 GiB already allocated; 21.81 MiB free; 11.20 GiB reserved in total by PyTorch)"""
LOGS = {"frames": FRAMES, "killed": KILLED, "reported": REPORTED}


def before(prefix: str) -> Callable[[str], str]:
    return lambda text: re.sub(r"(?m)^", lambda _: prefix, text)


def numbered(form: str) -> Callable[[str], str]:
    return lambda text: "\n".join(form % (at, line) for at, line in enumerate(text.split("\n"), 1))


def each_as(wrap: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: "\n".join(map(wrap, text.split("\n")))


def broken(width: int) -> Callable[[str], str]:
    return each_as(lambda line: "\n".join(line[at : at + width] for at in range(0, max(len(line), 1), width)))


WRAPS = {
    "Windows": lambda text: text.replace("\n", "\r\n"),
    "mail": before("> "),
    "Markdown": before("    "),
    "docker compose": before("app-1  | "),
    "a stream": before("stderr: "),
    "the journal": before("Mar 03 10:00:12 node-1 python3[4821]: "),
    "times": numbered("2025-03-01T10:00:%02d.120Z %s"),
    "two layers": lambda text: before("stderr: ")(numbered("2025-03-01T10:00:%02d.120Z %s")(text)),
    "grep -n": numbered("%d:%s"),
    "JSON of docker": each_as(lambda line: json.dumps({"log": f"{line}\n", "stream": "stderr", "time": "10:00"})),
    "JSON of a logger": each_as(lambda line: json.dumps({"levelname": "ERROR", "message": line})),
    "a spreadsheet": each_as(lambda line: '2025-03-01T10:00:01Z,"' + line.replace('"', '""') + '"'),
    "double spacing": lambda text: text.replace("\n", "\n\n"),
    "curly quotation marks": lambda text: text.replace('"', "\N{RIGHT DOUBLE QUOTATION MARK}"),
    "colours": each_as(lambda line: f"\x1b[31m{line}\x1b[0m"),
    "a mark of UTF-16": lambda text: "\N{ZERO WIDTH NO-BREAK SPACE}" + text,
    "80 columns": broken(80),
    "132 columns": broken(132),
}


def explained(text: str) -> str:
    return render(explain(text), words("en"))


@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_what_is_said_does_not_change(wrap: Callable[[str], str], log: str) -> None:
    assert explained(wrap(log)) == explained(log)


def test_a_pod_before_all_lines_is_who_was_killed() -> None:
    in_pod = before("[pod/app-0/app] ")
    assert explained(in_pod(FRAMES)) == explained(FRAMES)
    assert "container of the pod was killed" in explained(in_pod(KILLED))


@pytest.mark.parametrize("form", ["3: ", "[rank3]: ", "[1,3]<stderr>:"])
def test_a_rank_before_all_lines_is_told(form: str) -> None:
    found = read_log(before(form)(FRAMES)).failure
    assert found is not None
    assert found.rank == 3
    assert [each.source for each in found.frames] == [each.source for each in read_log(FRAMES).failure.frames]


def test_a_program_that_only_the_prefix_names_is_known() -> None:
    log = "cudaMalloc failed: out of memory\nllama_model_load: error loading model: unable to allocate CUDA0 buffer"
    assert "num_gpu" in explained(before("Mar 03 10:00:12 node-1 ollama[77]: ")(log))
    assert "num_gpu" not in explained(before("Mar 03 10:00:12 node-1 python[77]: ")(log))


def test_labels_above_a_title_change_nothing() -> None:
    log = "# CUDA out of memory when transcribing long audio\n\nA file of two hours fails on a card of 12 GB.\n"
    assert explained(f"bug, help wanted\nOpened 2 days ago\n\n{log}") == explained(log)


def test_a_traceback_on_one_line_is_read_frame_by_frame() -> None:
    assert explained(" ".join(line.strip() for line in FRAMES.split("\n"))) == explained(FRAMES)


@pytest.mark.parametrize("change", [str.lower, str.upper])
def test_a_message_in_letters_of_one_case_is_read(change: Callable[[str], str]) -> None:
    found, plain = read_log(change(FRAMES)).failure, read_log(FRAMES).failure
    assert found is not None
    assert plain is not None
    assert (found.kind, found.figures) == (plain.kind, plain.figures)


@pytest.mark.parametrize("below", ["wandb: Synced 5", "Process finished with exit code 1", "(base) me@host:~$ "])
def test_what_is_printed_below_any_failure_changes_nothing(below: str) -> None:
    message = FRAMES.rpartition("\n")[2]
    assert explained(f"{message}\n\n{below}\n") == explained(message)


def test_words_below_a_cut_traceback_do_not_end_it() -> None:
    cut = FRAMES.rpartition("\n")[0]
    for below in ("", "\n\nVersions: torch 2.6.0, Python 3.11\nAny help is appreciated.", "\n\nThanks!"):
        assert read_log(cut + below).status == "incomplete", below


def test_lines_of_one_length_are_no_broken_ones() -> None:
    rows = [f"| {name:<40} | {size:>8.2f} MiB | {name[::-1]:<20} |" for name in ("a", "b", "c") for size in (1, 2)]
    failed = "RuntimeError: CUDA error: out of memory"
    assert read_log("\n".join([*rows, failed])).failure.kind == "cuda_driver"
    bars = [
        f"Epoch {n}:  {n}%|#         | {n}/10 [00:0{n}<00:09,  1.00it/s, loss=0.12, lr=0.001, gn=0.5]" for n in range(5)
    ]
    assert read_log("\n".join([*bars, failed])).failure.message.startswith("CUDA error")
