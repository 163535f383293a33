"""Protocol of the simulation service: its requests and their answers.

A message is one JSON document behind its length in four bytes. Requests name their kind, so that one server plays
all of them; `ANSWERS` names the record that answers each.
"""

import os
from collections.abc import Mapping
from typing import Generic, TypeVar, cast

import msgspec

from tightfit.config import TrainConfig
from tightfit.simulation.details import CardSize, Detail, are_unchanged
from tightfit.simulation.speed import KernelCount
from tightfit.vgpu.records import Findings, Settings

A = TypeVar("A", bound=msgspec.Struct, covariant=True)
"""The record that answers a request."""


class Request(msgspec.Struct, Generic[A], frozen=True, kw_only=True, tag_field="kind"):
    """A question that the service answers."""

    @property
    def compiles(self) -> bool:
        """True if the play needs torch's compiler."""
        return False

    @property
    def is_remembered(self) -> bool:
        """True if the answer depends on nothing but the request, torch and this package."""
        return True

    def key(self) -> bytes:
        """Return everything that the answer depends on."""
        return msgspec.json.encode(self, order="sorted")

    def still_holds(self, answer: msgspec.Struct) -> bool:
        """Return True if a remembered answer is true today."""
        return True


class StepRequest(Request["StepTrace"], frozen=True, kw_only=True, tag="step"):
    """The trainer's own step on a card wide enough for it."""

    whole: bool
    """All phases of a run; False: the steps alone, to learn how memory grows."""
    config: TrainConfig
    """The run, with a plan's keys in it."""
    share: int
    """Sequences of a step that this device computes."""
    gpu: str
    """A card's exact name, or "" for the host."""
    capability: tuple[int, int] | None = None
    """Compute capability of a card that the table lacks."""
    environ: Mapping[str, str] = {}
    """Settings of the allocator."""
    cards: int = 1
    """Cards that train together; the first of them is played."""
    cards_per_node: int = 1

    @property
    def compiles(self) -> bool:
        return self.config.compile is True


class StepTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Memory and kernels of a traced step. Sizes in bytes."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    phase: str
    """Phase of the peak."""
    categories: dict[str, int]
    phases: dict[str, int]
    """Highest allocated bytes of each phase."""
    not_modelled: tuple[str, ...]
    parameters: int
    pass_kernels: tuple[KernelCount, ...]
    """Kernels of one forward and backward pass."""
    update_kernels: tuple[KernelCount, ...]
    """Kernels of clipping and the optimizer."""


class LoopSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of nanoGPT's loop: its own keys, and the extent of the play."""

    config: TrainConfig
    """The run, with nothing left on "auto"; `eval_micro_batch` are the sequences of an evaluation's forward pass."""
    passes: int
    """Forward passes of a step."""
    steps: int
    """Optimizer steps."""
    evaluate: str
    """as_is, eager (without torch.compile) or none."""
    eval_iters: int
    """Iterations of an evaluation, for each split."""
    release: bool
    """End each iteration of an evaluation with `del logits, loss`."""


class LoopRequest(Request["LoopPlay"], frozen=True, kw_only=True, tag="loop"):
    """nanoGPT's training loop on a card of a given size."""

    settings: LoopSettings
    gpu: str
    memory_bytes: int | None = None
    used_bytes: int = 0
    context_bytes: int | None = None
    environ: Mapping[str, str] = {}
    """Settings of the allocator."""

    @property
    def compiles(self) -> bool:
        return self.settings.config.compile is True


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """The start of one part of nanoGPT's loop."""

    part: str
    """eval, pass, update or stepped."""
    step: int | None = None
    number: int | None = None
    """Pass of the step."""
    split: str | None = None
    iteration: int | None = None
    """Iteration of the evaluation."""
    seconds: float
    """Seconds of the card up to here."""
    kernels: int
    """Kernels launched up to here."""


class LoopPlay(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of nanoGPT's loop."""

    findings: Findings
    course: tuple[Moment, ...]
    """Parts of the loop in the order in which they began."""
    play_seconds: float


class ScriptRequest(Request["Findings"], frozen=True, kw_only=True, tag="script"):
    """Somebody's own script. Texts are as `sent` makes them."""

    script: str
    arguments: tuple[str, ...]
    settings: Settings
    environ: Mapping[str, str]
    """Environment that the script finds."""
    folder: str
    """Working folder of the script."""
    replaced: Mapping[str, str] = {}
    """Text that the script finds in a file instead of its own; only where a private view keeps the file as it is."""
    is_quiet: bool = False
    """True if nobody reads the output of the script."""

    @property
    def is_remembered(self) -> bool:
        return False


class DetailRequest(Request["Detail"], frozen=True, kw_only=True, tag="detail"):
    """Somebody's own script, with the details that questions about it need."""

    run: ScriptRequest
    cards: tuple[CardSize, ...] = ()
    """Cards on which the same run is judged, too."""
    remember: bool = True
    """False for a script that no later question asks about."""
    trusts_errors: bool = False
    """True if the script is known to run, so that a remembered error comes from this request's card or values."""

    @property
    def is_remembered(self) -> bool:
        return self.remember

    def key(self) -> bytes:
        """Leave out variables that differ from one terminal to the next."""
        environ = {name: value for name, value in self.run.environ.items() if name not in _PASSING_VARIABLES}
        run = msgspec.structs.replace(self.run, environ=environ)
        return msgspec.json.encode(msgspec.structs.replace(self, run=run, trusts_errors=False), order="sorted")

    def still_holds(self, answer: msgspec.Struct) -> bool:
        """Return True if the script, its imports, and the files and folders that it read are as they were.

        An error may have gone with something that a play does not note, such as a package that was missing.
        """
        assert isinstance(answer, Detail)
        is_whole = answer.findings.failure is not None or not answer.is_cut_short
        may_err = self.trusts_errors or answer.findings.outcome != "error"
        return is_whole and may_err and are_unchanged(answer.files)


_OF_A_TERMINAL = (
    "_ COLUMNS LINES OLDPWD PWD SHLVL TERM TERM_PROGRAM TERM_SESSION_ID TIGHTFIT_LANG SSH_AUTH_SOCK SSH_CLIENT "
    "SSH_CONNECTION SSH_TTY TMUX TMUX_PANE WINDOWID XDG_SESSION_ID PYTEST_CURRENT_TEST PYTEST_XDIST_WORKER"
)
_PASSING_VARIABLES = frozenset(_OF_A_TERMINAL.split())
"""Variables of a terminal, on which no memory depends."""


def sent(text: str) -> str:
    """Return a file name, argument or variable in a form that JSON can hold, whatever its bytes."""
    return os.fsencode(text).decode("latin-1")


def received(text: str) -> str:
    """Undo `sent`.

    >>> received(sent("caffè"))
    'caffè'
    """
    return os.fsdecode(text.encode("latin-1"))


class HostRequest(Request["HostRates"], frozen=True, kw_only=True, tag="host"):
    """Rates of this machine's processor, and the bytes that a training process holds before its first tensor."""

    processor: str
    """Model of the processor, its cores and its threads: another machine is measured anew."""


class HostRates(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of this machine."""

    flops: dict[str, float]
    """FLOP/s of large matrix products, by dtype."""
    bandwidth: float
    """Bytes/s of a large negation."""
    base_bytes: dict[str, int]
    """Bytes of a process with all of training loaded, by the source that counts them."""


class TimingRequest(Request["Timing"], frozen=True, kw_only=True, tag="timing"):
    """A few passes of the trainer's step, timed on the device of this machine."""

    config: TrainConfig
    share: int
    """Sequences of a step that this device computes."""
    device_name: str
    """Another device is timed anew."""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Measured seconds."""

    pass_s: float
    """One forward and backward pass."""
    update_s: float
    """Clipping and the optimizer."""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """A play that could not be made."""

    error: str
    traceback: str = ""
    exit_code: int = 0
    """Exit code of a user's mistake; 0 for any other failure."""


AnyRequest = StepRequest | LoopRequest | ScriptRequest | DetailRequest | HostRequest | TimingRequest


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request on its way to the server."""

    number: int
    request: AnyRequest


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a request on its way back."""

    number: int
    answer: msgspec.Raw = msgspec.Raw(b"null")
    """JSON of the record that answers; null if the play failed."""
    failed: Failed | None = None
    steps: int = 0
    """Above 0 in a message before the outcome: optimizer steps played so far."""


_ANSWERS: dict[type, type[msgspec.Struct]] = {
    StepRequest: StepTrace,
    LoopRequest: LoopPlay,
    ScriptRequest: Findings,
    DetailRequest: Detail,
    HostRequest: HostRates,
    TimingRequest: Timing,
}


def decode_answer(request: Request[A], data: bytes | msgspec.Raw) -> A:
    """Read the record that answers `request` from its JSON. `msgspec.MsgspecError` for another shape."""
    return cast(A, msgspec.json.decode(data, type=_ANSWERS[type(request)]))
