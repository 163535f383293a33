"""A remedy as a change of the configuration file that was given."""

from pathlib import Path

import msgspec

from tightfit.diagnosis.config_edits import edited
from tightfit.diagnosis.config_rules import settings_in
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.remedies import VERDICTS
from tightfit.diagnosis.render import effects, shown_remedies
from tightfit.diagnosis.statements import Sentences
from tightfit.storage import as_diff
from tightfit.wording.diagnosis import words


class ConfigFix(msgspec.Struct, frozen=True, kw_only=True):
    """A changed configuration file."""

    path: str
    title: str
    effects: str
    """Its effects on the result and the time, in words."""
    before: str
    after: str

    @property
    def diff(self) -> str:
        """The change as a unified diff, which `patch` takes."""
        return as_diff(self.path, self.before, self.after)


def config_fix(found: Explanation, path: str) -> ConfigFix | None:
    """Return the first of the shown remedies that the file's own keys can carry, an exact one first; None without one.

    OSError or UnicodeDecodeError if the file cannot be read as text.
    """
    before = Path(path).read_bytes().decode()
    told = words(found.language)
    for remedy in sorted(shown_remedies(found), key=lambda each: (VERDICTS.index(each.verdict), not each.exact)):
        settings = settings_in(remedy.paste)
        after = edited(path, before, settings) if settings else None
        if settings and after is not None and after != before:
            title = Sentences(found, told).title(remedy)
            notes = told("units", "separator").join(effects(remedy, told))
            return ConfigFix(path=path, title=title, effects=notes, before=before, after=after)
    return None
