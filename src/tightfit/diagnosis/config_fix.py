"""A remedy as a change of the configuration file that was given."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from tightfit.diagnosis.config_edits import edited
from tightfit.diagnosis.config_programs import program_of
from tightfit.diagnosis.config_rules import path_of, settings_in
from tightfit.diagnosis.config_values import Value, values_in
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


def config_fix(found: Explanation, paths: Sequence[str]) -> ConfigFix | None:
    """Return the first of the shown remedies that one of the files can carry; None without one.

    Those that change the result come last.

    OSError or UnicodeDecodeError if a file cannot be read as text.
    """
    texts = {path: Path(path).read_bytes().decode() for path in paths}
    told = words(found.language)
    for remedy in sorted(shown_remedies(found), key=lambda each: (VERDICTS.index(each.verdict), each.exact is False)):
        settings = settings_in(remedy.paste)
        path = _file_of(settings, found, texts)
        if not settings or path is None or not _names_files(settings, path):
            continue
        before = texts[path]
        after = edited(path, before, settings)
        if after is not None and after != before:
            title = Sentences(found, told).title(remedy)
            notes = told("units", "separator").join(effects(remedy, told))
            return ConfigFix(path=path, title=title, effects=notes, before=before, after=after)
    return None


def _file_of(settings: Mapping[str, Value], found: Explanation, texts: Mapping[str, str]) -> str | None:
    """Return the file whose keys these are: the last that has one of them, or the last of the program itself."""
    values = {path: values_in(path, text) for path, text in texts.items()}
    having = [path for path, each in values.items() if any(path_of(key, each) for key in settings)]
    program = found.foreign.program if found.foreign is not None else None
    own = [path for path, each in values.items() if program in (None, "other", program_of(each))]
    return next(iter([*reversed(having), *reversed(own)]), None)


def _names_files(settings: Mapping[str, Value], path: str) -> bool:
    """Return True if each file that a setting names is there, in this folder or in the configuration's."""
    named = [each for each in settings.values() if isinstance(each, str) and Path(each).suffix in _FILES]
    return all(Path(each).is_file() or (Path(path).parent / each).is_file() for each in named)


_FILES = (".json", ".yaml", ".yml", ".toml")
