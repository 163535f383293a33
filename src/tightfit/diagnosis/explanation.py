"""An explanation as a record, and as the JSON that `--json` prints."""

import msgspec
from msgspec.structs import replace

from tightfit.diagnosis.cause_records import Cause
from tightfit.diagnosis.culprit import Culprit
from tightfit.diagnosis.foreign_config import Foreign
from tightfit.diagnosis.model_run import ModelRun
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.remedies import FITS, Remedy
from tightfit.display import Displayed
from tightfit.oomlog.facts import Facts, OtherProcess
from tightfit.oomlog.log_reader import LogReading
from tightfit.oomlog.tracebacks import TraceFrame
from tightfit.wording.diagnosis import words


class Explanation(Displayed, msgspec.Struct, frozen=True, kw_only=True):
    """The failure, its tensor, its causes and its remedies."""

    facts: Facts | None
    """None: there is no failure in the log."""
    reading: LogReading
    language: str
    card: Card | None = None
    culprit: Culprit | None = None
    causes: tuple[Cause, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    played: str = ""
    """config, log (its printed keys), script, model (another program's configuration), or empty."""
    model_run: ModelRun | None = None
    """The training step that was played for another program's configuration."""
    unplayed_because: str = ""
    """A key of the words' table `unplayed`, where nothing was played."""
    framework: str | None = None
    """The program that made the log, a table of frameworks.toml; None where it is not known."""
    purpose: str | None = None
    """training or inference, as far as the report shows it; None for a play."""
    purpose_sign: str = ""
    """The words of the report that show it; empty where its program does."""
    is_bare: bool = False
    """True if the log is hardly more than the message."""
    foreign: Foreign | None = None
    """The configuration of another program that was given."""
    config_names: tuple[str, ...] = ()
    """Names of the configuration as given on the command line, for the commands to paste."""
    max_iters: int | None = None
    """Steps of the configuration that was played; None if none was."""
    not_modelled: tuple[str, ...] = ()
    """Operators in the play without a model of their memory."""
    seconds: float = 0.0
    """Time that the explanation took."""

    @property
    def best(self) -> Remedy | None:
        """The first remedy, if it fits."""
        return self.remedies[0] if self.remedies and self.remedies[0].verdict == FITS else None

    @property
    def _kind_of_nothing(self) -> str | None:
        """The kind of a failure that was survived."""
        return self.reading.caught.kind if self.reading.caught else None

    @property
    def is_elsewhere(self) -> bool:
        """True if the log is of a program that takes neither nanoGPT's keys nor tightfit's."""
        is_other = self.foreign is not None or not (self.framework == "nanogpt" or self.is_bare)
        return self.unplayed_because == "config" and is_other

    @property
    def is_unnamed(self) -> bool:
        """True if the log is a message alone, of any program."""
        return self.unplayed_because == "config" and self.is_bare and self.framework is None

    def __str__(self) -> str:
        from tightfit.diagnosis.render import render

        return render(self, words(self.language))

    def to_json(self) -> "ExplanationJson":
        """Return the record that `--json` prints, with sentences in the explanation's language."""
        from tightfit.diagnosis.statements import Sentences

        said = Sentences(self, words(self.language))
        facts = msgspec.convert(self.facts, ExplanationJson, from_attributes=True) if self.facts else ExplanationJson()
        return replace(
            facts,
            status=self.reading.status,
            kind=facts.kind if self.facts else self._kind_of_nothing,
            culprit=self.culprit,
            causes=tuple(map(said.told, self.causes)),
            remedies=tuple(
                RemedyJson(
                    code=each.code,
                    verdict=each.verdict,
                    label=each.label,
                    exact=each.exact,
                    device_bytes=each.device_bytes,
                    saved_bytes=each.saved_bytes,
                    slowdown=each.slowdown,
                    title=said.title(each),
                    sentence=said.reason(each),
                    paste=said.paste(each),
                    page=each.page,
                    applicability=each.applicability or ("exact" if each.exact else "changes_result"),
                )
                for each in self.remedies
            ),
        )


class RemedyJson(msgspec.Struct, frozen=True, kw_only=True):
    """A remedy with its sentences; `Remedy` describes the other fields."""

    code: str
    verdict: str
    label: str
    exact: bool | None
    device_bytes: int | None
    saved_bytes: int | None
    slowdown: float | None
    title: str
    sentence: str
    paste: tuple[str, ...]
    page: str
    applicability: str


class ExplanationJson(msgspec.Struct, frozen=True, kw_only=True):
    """An explanation for machines: an absent value is null, sizes are bytes, printed ones converted exactly.

    `Facts` describes the fields that come from the log.
    """

    status: str | None = None
    """End of the run: a key of the table `status` in oomlog/codes.toml."""
    kind: str | None = None
    torch_format: str | None = None
    requested_bytes: int | None = None
    device_index: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    process_bytes: int | None = None
    allocated_bytes: int | None = None
    unallocated_bytes: int | None = None
    reserved_bytes: int | None = None
    private_pool_bytes: int | None = None
    allowed_bytes: int | None = None
    others_bytes: int | None = None
    outside_pytorch_bytes: int | None = None
    other_processes: tuple[OtherProcess, ...] = ()
    rank: int | None = None
    phase: str | None = None
    frames: tuple[TraceFrame, ...] = ()
    culprit: Culprit | None = None
    causes: tuple[Cause, ...] = ()
    remedies: tuple[RemedyJson, ...] = ()
