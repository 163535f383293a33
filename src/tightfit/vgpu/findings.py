"""Findings of a session: the peak and its tensors, the failure, and the assumptions."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from tightfit.kernels.operators import NOT_MODELLED
from tightfit.vgpu.recorder import Allocation
from tightfit.vgpu.records import CATEGORIES, Failure, Findings, LargeTensor, MadeUp, Peak, Place, VirtualCard
from tightfit.vgpu.session import VirtualSession
from tightfit.vgpu.timeline import timeline_of
from tightfit.wording import say

_LARGEST = 10
_LISTED_MADE_UP = 20


def findings_of(session: VirtualSession, error: BaseException | None = None, *, seconds: float = 0.0) -> Findings:
    """Return the findings so far. `error` ended the script, if it was not meant to end there.

    An out-of-memory error in one of its threads counts as such an error.
    """
    device, recorder = session.device, session.device.recorder
    error = error or device.thread_error
    failure = _failure(session) if _ran_out(session, error) else None
    alive = recorder.alive_at(device.events_at_failure if failure else recorder.peak_event)
    return Findings(
        outcome="out_of_memory" if failure else ("fits" if error is None else "error"),
        gpu=_card(session),
        torch=".".join(map(str, device.card.torch_version)),
        peak=_peak(session),
        categories=by_category(alive),
        categories_by_phase=_by_category_and_phase(alive),
        phases={str(phase): nbytes for phase, nbytes in recorder.phase_peaks.items()},
        largest=[_large(each) for each in sorted(alive, key=lambda each: -each.nbytes)[:_LARGEST]],
        failure=failure,
        caught_failures=device.caught_failures - (1 if failure else 0),
        steps=session.phases.steps,
        stopped_because=_why_it_ended(session, error, failure),
        not_played=[Place(file=line.file, line=line.line) for line in session.not_played],
        made_up_values=_made_up(session),
        not_written=device.not_written,
        not_modelled=device.not_modelled,
        never_modelled=list(NOT_MODELLED),
        notes=[*session.notes, *device.assumed.sentences(), *device.values.undecided.sentences()],
        is_shortened=session.is_shortened,
        needed=device.assumed.needed_by(error) if error is not None and failure is None else None,
        seconds=round(seconds, 3),
        timeline=timeline_of(recorder) if session.settings.timeline else None,
    )


def _ran_out(session: VirtualSession, error: BaseException | None) -> bool:
    """Return True if the script failed because memory ran out, or caught that error and then gave up.

    To give up is to take no more memory and to end with another error, or without one in the first step. A script that
    did steps may leave out a single batch, and one in its setup may fill the card on purpose: these did not give up.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    device = session.device
    since = device.recorder.events[device.events_at_failure :]
    if device.failure is None or any(number > 0 for number in since):
        return False
    if error is not None:
        return any(isinstance(each, torch.OutOfMemoryError) for each in errors_behind(error))
    return not (session.ends_early or session.phases.steps or device.failure[0].phase == "setup")


def errors_behind(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def _card(session: VirtualSession) -> VirtualCard:
    allocator = session.allocator
    return VirtualCard(
        name=session.gpu.name,
        capability=".".join(map(str, session.gpu.capability)),
        total_bytes=allocator.total_bytes,
        used_by_others_bytes=allocator.used_by_others,
        context_bytes=allocator.context_bytes,
    )


def _peak(session: VirtualSession) -> Peak:
    peaks = session.device.peaks()
    return Peak(
        requested_bytes=peaks["requested"],
        allocated_bytes=peaks["allocated"],
        reserved_bytes=peaks["reserved"],
        device_bytes=session.allocator.context_bytes + peaks["reserved"],
        phase=session.device.recorder.peak_phase,
    )


def _why_it_ended(session: VirtualSession, error: BaseException | None, failure: Failure | None) -> str:
    if failure:
        caught = not isinstance(error, torch.OutOfMemoryError)
        return say("vgpu.findings.gave_up" if caught else "vgpu.findings.out_of_memory")
    if error is not None:
        return say("vgpu.findings.failed", error=_in_short(error))
    return session.stopped_because


def _in_short(error: BaseException) -> str:
    """Name an error as the last line of its traceback does, and the first one that it was raised from.

    An error that torch carries over from a worker of a DataLoader or a thread holds a whole traceback in its message,
    with the error itself at the end (`torch._utils.ExceptionWrapper`).
    """
    where, carried, traceback = str(error).partition("\nOriginal Traceback (most recent call last):\n")
    if not carried:
        causes = [each for each in _causes(error) if str(each) not in str(error)]
        named = f"{type(error).__name__}: {error!s:.500}".rstrip().removesuffix(":")
        return say("vgpu.findings.caused_by", error=named, cause=_in_short(causes[-1])) if causes else named
    lines = traceback.rstrip().splitlines()
    first = max((number for number, line in enumerate(lines) if line[:1].isspace()), default=-1) + 1
    text = "\n".join(lines[first:] or lines[-1:])
    return f"{text:.500} ({where.removeprefix(f'Caught {type(error).__name__} ').rstrip('.')})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors that one was raised from, the nearest first."""
    seen = [error]
    while (cause := error.__cause__) is not None and cause not in seen:
        yield cause
        seen.append(error := cause)


def _failure(session: VirtualSession) -> Failure | None:
    if session.device.failure is None:
        return None
    allocation, error = session.device.failure
    return Failure(
        **allocation.origin(),
        phase=allocation.phase,
        requested_bytes=error.requested_bytes,
        tensor_bytes=error.tensor_bytes,
        allocated_bytes=error.allocated_bytes,
        reserved_bytes=error.reserved_bytes,
        total_bytes=error.total_bytes,
        free_bytes=error.free_bytes,
        process_bytes=error.process_bytes,
        message=error.message(session.device.card.torch_version),
    )


def _large(allocation: Allocation) -> LargeTensor:
    return LargeTensor(**allocation.origin(), phase=allocation.phase, bytes=allocation.nbytes)


def by_category(alive: Iterable[Allocation]) -> dict[str, int]:
    """Sum the bytes of each category that occurs."""
    sums = dict.fromkeys(CATEGORIES, 0)
    for allocation in alive:
        sums[allocation.category] += allocation.nbytes
    return {name: nbytes for name, nbytes in sums.items() if nbytes}


def _by_category_and_phase(alive: Iterable[Allocation]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for allocation in alive:
        table[allocation.category][allocation.phase] += allocation.nbytes
    return {category: dict(row) for category, row in table.items()}


def _made_up(session: VirtualSession) -> list[MadeUp]:
    counts = session.device.values.made_up
    return [
        MadeUp(what=what, times=times, file=line.file if line else "", line=line.line if line else 0)
        for (line, what), times in counts.most_common(_LISTED_MADE_UP)
    ]
