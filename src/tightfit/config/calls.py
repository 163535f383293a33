"""The configuration of a Python call: a `Config` or a config file, and keys that win over it."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tightfit.config.reader import Resolved, read_config
from tightfit.config.schema import C, checked, defaults
from tightfit.errors import ConfigError
from tightfit.wording import say

CALL = "call"
"""Source of a value that the caller gave."""


def read_call(
    schema: type[C],
    config: C | str | os.PathLike[str] | None,
    keys: Mapping[str, object],
    *,
    warn: Callable[[str], object],
    keywords: Sequence[str] = (),
) -> Resolved[C]:
    """Return the configuration of a call; `keywords` are the function's other names, for suggestions.

    ConfigError for a file, key or value that the command line would refuse, too.
    """
    values = {key: checked(schema, _known(schema, key, keywords), value) for key, value in keys.items()}
    if config is None:
        base = read_config(schema, [])
    elif isinstance(config, schema):
        usual = defaults(schema)
        given = {key: "default" if value == usual[key] else CALL for key, value in vars(config).items()}
        base = Resolved(config, given, ())
    elif isinstance(config, str | os.PathLike):
        base = read_config(schema, [os.fspath(config)], warn=warn)
    else:
        raise ConfigError(say("config.calls.no_config", value=config))
    return Resolved(replace(base.config, **values), base.sources | dict.fromkeys(keys, CALL), base.warnings)


def _known(schema: type[C], key: str, keywords: Sequence[str]) -> str:
    known = [*defaults(schema), *keywords]
    if key in defaults(schema):
        return key
    near = difflib.get_close_matches(key, known, n=1)
    hint = say("config.calls.did_you_mean", near=near[0]) if near else say("config.calls.where_keys_are")
    raise ConfigError(say("config.calls.no_key", key=key, hint=hint))
