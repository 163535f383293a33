"""Read the processor's name and instruction sets, from /proc/cpuinfo on Linux."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the line of /proc/cpuinfo with the model's name; the platform's name without that line."""
    return next((line for line in _lines() if line.startswith("model name")), platform.processor())


def processor_flags() -> set[str]:
    """Return the processor's features as Linux names them, like avx512_bf16; none on other systems.

    Builds of torch for macOS and Windows have no fast bfloat16 for processors, so nobody asks there.
    """
    found = (line.split(":", 1)[1] for line in _lines() if line.lower().startswith(("flags", "features")))
    return set(next(found, "").split())


def _lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
