"""The program `nvidia-smi` of the virtual card, for child processes of a script: a table, a list or a query.

It runs by itself, without this package: the card is in the environment.
"""

import json
import os
import sys
import time
from typing import Any

Card = dict[str, Any]  # facts of two types
WIDTH = 89
HEADS = (
    (" GPU  Name                 Persistence-M", " Bus-Id          Disp.A", " Volatile Uncorr. ECC"),
    (" Fan  Temp   Perf          Pwr:Usage/Cap", "           Memory-Usage", " GPU-Util  Compute M."),
)
UNITS = {"memory": "MiB", "utilization": "%", "power": "W", "clocks": "MHz", "fan": "%"}


def answer(field: str, card: Card, index: int) -> str | int | None:
    """Return one field of --query-gpu without its unit, or None if this card has none of that name."""
    plain: dict[str, str | int] = {
        "timestamp": time.strftime("%Y/%m/%d %H:%M:%S.000"),
        "driver_version": card["driver"],
        "count": card["count"],
        "name": card["name"],
        "gpu_name": card["name"],
        "index": index,
        "uuid": card["uuid"],
        "gpu_uuid": card["uuid"],
        "compute_cap": card["compute_cap"],
        "memory.total": card["total"],
        "memory.used": card["used"],
        "memory.free": card["free"],
        "memory.reserved": 0,
        "utilization.gpu": 0,
        "utilization.memory": 0,
        "temperature.gpu": 40,
        "power.draw": "30.00",
        "power.limit": "350.00",
        "fan.speed": 0,
        "pstate": "P2",
        "pci.bus_id": f"00000000:{index + 1:02X}:00.0",
        "gpu_bus_id": f"00000000:{index + 1:02X}:00.0",
        "persistence_mode": "Enabled",
        "compute_mode": "Default",
        "clocks.sm": 1700,
        "clocks.gr": 1700,
        "clocks.mem": 9501,
        "pid": card["pid"],
        "process_name": card["process"],
        "used_memory": card["used"],
        "used_gpu_memory": card["used"],
    }
    return plain.get(field)


def query(fields: list[str], layout: str, card: Card, rows: int) -> int:
    if "noheader" not in layout:
        print(", ".join(name + (f" [{unit}]" if (unit := unit_of(name)) else "") for name in fields))
    for index in range(rows):
        values = []
        for name in fields:
            value = answer(name, card, index)
            if value is None:
                print(f'Field "{name}" is not a valid field to query.\n')
                return 2
            unit = "" if "nounits" in layout else unit_of(name)
            values.append(f"{value} {unit}".strip())
        print(", ".join(values))
    return 0


def unit_of(field: str) -> str:
    return "MiB" if field.startswith("used_") else UNITS.get(field.partition(".")[0], "")


def table(card: Card) -> int:
    rule = "+" + "-" * WIDTH + "+"
    thick = "|" + "=" * 41 + "+" + "=" * 24 + "+" + "=" * 22 + "|"
    thin = "+" + "-" * 41 + "+" + "-" * 24 + "+" + "-" * 22 + "+"
    print(time.strftime("%a %b %e %H:%M:%S %Y"), rule, sep="\n")
    head = f" NVIDIA-SMI {card['driver']:<22} Driver Version: {card['driver']:<14} CUDA Version: {card['cuda']}"
    print(f"|{head:<{WIDTH}}|", thin, sep="\n")
    for left, middle, right in HEADS:
        print(f"|{left:<41}|{middle:<24}|{right:<22}|")
    print(thick)
    for index in range(card["count"]):
        name = f"{index:>4}  {card['name']:.26}"
        print(f"|{name:<37} On |{f'   00000000:{index + 1:02X}:00.0 Off':<24}|{'N/A':>21} |")
        usage = f"{card['used']}MiB / {card['total']:>6}MiB"
        print(
            f"|{'  0%   40C    P2              30W /  350W':<41}|{usage:>23} |{'0%      Default':>21} |", thin, sep="\n"
        )
    print("", rule, f"|{' Processes:':<{WIDTH}}|", sep="\n")
    print(f"|{'  GPU   GI   CI              PID   Type   Process name                        GPU Memory':<{WIDTH}}|")
    print("|" + "=" * WIDTH + "|")
    row = f"    0   N/A  N/A {card['pid']:>16}      C   {card['process']:<35} {card['used']:>7}MiB"
    print(f"|{row:<{WIDTH}}|", rule, sep="\n")
    return 0


def main(words: list[str]) -> int:
    text = os.environ.get("TIGHTFIT_VIRTUAL_CARD")
    if not text:
        print("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
        return 9
    card = json.loads(text)
    options: dict[str, str] = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, has_value, value = word.partition("=")
        if name.startswith("-"):
            options[name.lstrip("-")] = value if has_value else following
    layout = options.get("format", "")
    for name, rows in (("query-gpu", card["count"]), ("query-compute-apps", 1)):
        if name in options:
            chosen = str(options.get("id", options.get("i", "")))
            rows = 1 if chosen.isdigit() else rows
            return query([field.strip() for field in options[name].split(",")], layout, card, rows)
    if "L" in options or "list-gpus" in options:
        for index in range(card["count"]):
            print(f"GPU {index}: {card['name']} (UUID: {card['uuid']})")
        return 0
    return table(card)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
