"""Public measurements of real cards against the virtual GPU: rows with their sources, to CSV.

usage: python benchmarks/virtual/public.py --sources FOLDER [--only WORD] [--libraries FOLDER]

results/public.csv holds the rows: who measured what, with which script, arguments and card. A row of Liger-Kernel is
played again by this command: FOLDER/Liger-Kernel is a clone of github.com/linkedin/Liger-Kernel, and its script runs at
the commit in `source` (players/liger.py). `--libraries` goes before other packages: transformers of the row's time,
megatron-core. `--only` takes rows whose script has the word. Rows of other sources keep the prediction that the command
in their `note` gave. The torch of a Liger row is not recorded: the newest release of its day is assumed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from row_files import Row, read_rows, write_rows

HERE = Path(__file__).parent
TABLE = HERE / "results" / "public.csv"
_PLAYED = re.compile(r"ROW.*?(\d+) (\d+) \d+$", re.MULTILINE)
_FAILED = re.compile(r"^ERROR (\d+) (.*)$", re.MULTILINE)
_ARGUMENTS = re.compile(r"(\S+) (\S*) x=(\S+) (.*)")
_PLAYED_AT = re.compile(r"played at ([0-9a-f]{8})")
"""A row's note where the code that was measured is not that of the commit in `source`."""
_VERSION = "Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.0.0\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--libraries", default="")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    rows = read_rows(TABLE)
    for group in groups(row for row in rows if row["source"].startswith("linkedin/") and options.only in row["script"]):
        play(group, options.sources / "Liger-Kernel", options.libraries)
        print(group[0]["script"], group[0]["card"], summary(group), flush=True)
        write_rows(TABLE, rows)
    print(summary(rows))


def groups(rows: Iterator[Row]) -> list[list[Row]]:
    """Group rows that one process plays: the same script at the same commit on the same card, in one configuration."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[commit_of(row), row["script"], row["card"], row["torch"], config_of(row)].append(row)
    return list(found.values())


def config_of(row: Row) -> str:
    """Return the configuration of a row, as JSON."""
    match = _ARGUMENTS.fullmatch(row["args"])
    return match[4] if match else ""


def commit_of(row: Row) -> str:
    """Return the commit whose code plays a row."""
    other = _PLAYED_AT.search(row["note"])
    return other[1] if other else row["source"].rpartition("@")[2]


def play(rows: list[Row], clone: Path, libraries: str) -> None:
    """Play rows and write the predictions into them."""
    first = rows[0]
    kernel, _, script = first["script"].partition(" of ")
    wanted = [[kernel, *_ARGUMENTS.fullmatch(row["args"]).groups()] for row in rows]  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        checkout(clone, commit_of(first), Path(folder))
        Path(folder, "wanted.json").write_text(json.dumps(wanted))
        words = ["dryrun", "--json", "--no-explain", "--gpu", first["card"], "--torch", first["torch"]]
        player = [str(HERE / "players" / "liger.py"), folder, script, f"{folder}/wanted.json"]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), libraries]))}
        command = [sys.executable, "-m", "tightfit", *words, *player]
        output = subprocess.run(command, capture_output=True, text=True, env=environ, check=False).stderr
    for number, nbytes in _PLAYED.findall(output):
        row = rows[int(number)]
        row["predicted_bytes"] = nbytes
        row["error"] = f"{int(nbytes) / int(row['measured_bytes']) - 1:.6f}"
    for number, reason in _FAILED.findall(output):
        rows[int(number)].update(predicted_bytes="", error="", note=reason)


def checkout(clone: Path, commit: str, folder: Path) -> None:
    """Unpack the package, its benchmarks and the helpers of its tests at a commit, and name the package."""
    for part in (["src"], ["benchmark/scripts"], ["test", ":!test/resources"]):
        done = subprocess.run(["git", "-C", clone, "archive", commit, *part], capture_output=True, check=False)
        with tarfile.open(fileobj=BytesIO(done.stdout), mode="r|") as archive:
            archive.extractall(folder, filter="data")
    (folder / "src" / "liger_kernel-0.0.0.dist-info").mkdir()
    (folder / "src" / "liger_kernel-0.0.0.dist-info" / "METADATA").write_text(_VERSION)


def summary(rows: list[Row]) -> str:
    """Say how many rows were played, and how well."""
    errors = sorted(abs(float(row["error"])) for row in rows if row["error"])
    if not errors:
        return f"0 of {len(rows)} rows played"
    near = sum(error <= 0.01 for error in errors)
    exact = sum(row["predicted_bytes"] == row["measured_bytes"] for row in rows)
    return (
        f"{len(errors)} of {len(rows)} rows played: {exact} to the byte, {near} within 1%, "
        f"median {statistics.median(errors):.4%}, worst {errors[-1]:.2%}"
    )


if __name__ == "__main__":
    main()
