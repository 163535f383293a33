"""The card that a caller describes, and checks of the description. No torch."""

import re

from tightfit.errors import ConfigError
from tightfit.gpus import GPU, resolve_gpu
from tightfit.wording import say

_TORCH = re.compile(r"2\.(?P<minor>\d{1,2})(\.\w+)*(\+cu(?P<cuda>\d{3}))?$")


def described_gpu(
    name: str,
    *,
    memory_bytes: int | None = None,
    used_bytes: int = 0,
    capability: tuple[int, int] | None = None,
) -> tuple[GPU, list[str]]:
    """Return the card, and a sentence for each fact that the description leaves open.

    DeviceError for an unknown card, ConfigError for figures that no card has.
    """
    check_name(name)
    check_bytes("memory_bytes", memory_bytes)
    check_bytes("used_bytes", used_bytes)
    check_capability(capability)
    pair = None if capability is None else (capability[0], capability[1])  # a list, from a file, counts too
    gpu, notes = resolve_gpu(name, memory_bytes=memory_bytes, capability=pair)
    total = memory_bytes or gpu.planning_bytes
    if used_bytes >= total:
        raise ConfigError(say("vgpu.card_arguments.all_used", used=used_bytes, total=total, name=gpu.name))
    return gpu, notes


def check_name(value: object) -> None:
    """Raise ConfigError unless `value` is text; the table of cards decides about the text."""
    if not isinstance(value, str):
        raise ConfigError(say("vgpu.card_arguments.name", value=value))


def check_bytes(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is None or a number of bytes."""
    if value is not None and not (is_whole(value) and value >= 0):  # type: ignore[operator]
        raise ConfigError(say("vgpu.card_arguments.bytes", name=name, value=value))


def check_capability(value: object) -> None:
    """Raise ConfigError unless `value` is None or a pair of numbers."""
    if value is not None and not (isinstance(value, tuple | list) and len(value) == 2 and all(map(is_whole, value))):
        raise ConfigError(say("vgpu.card_arguments.capability", value=value))


def check_torch(value: object) -> None:
    """Raise ConfigError unless `value` is None or a version of torch 2."""
    if value is not None and not (isinstance(value, str) and _TORCH.match(value)):
        raise ConfigError(say("vgpu.card_arguments.torch", value=value))


def torch_versions(text: str) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Return the version of torch in a checked text, and of CUDA if the text names it.

    >>> torch_versions("2.6.0+cu124"), torch_versions("2.10")
    (((2, 6), (12, 4)), ((2, 10), None))
    """
    found = _TORCH.match(text)
    assert found
    cuda = found["cuda"]
    return (2, int(found["minor"])), (int(cuda[:2]), int(cuda[2:])) if cuda else None


def is_whole(value: object) -> bool:
    """Return True for a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
