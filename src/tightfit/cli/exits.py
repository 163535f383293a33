"""Exit codes, and the JSON of a record."""

import json

import msgspec

OK, FAILED, USER_MISTAKE, OUR_ERROR, INTERRUPTED = 0, 1, 2, 3, 130


def as_json(record: object) -> str:
    """Encode a record, or a list of them, for --json."""
    return json.dumps(msgspec.to_builtins(record), indent=2, ensure_ascii=False)
