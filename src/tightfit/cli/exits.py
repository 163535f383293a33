"""Exit codes, and the JSON of a record."""

import json

import msgspec

OK, FAILED, OUR_ERROR, INTERRUPTED = 0, 1, 3, 130
"""A user's mistake ends with the `exit_code` of its error, 2."""


def as_json(record: object) -> str:
    """Encode a record, or a list of them, for --json."""
    return json.dumps(msgspec.to_builtins(record), indent=2, ensure_ascii=False)
