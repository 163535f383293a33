"""The card that a caller describes, and checks of the description. No torch."""

from tightfit.errors import ConfigError
from tightfit.gpus import GPU, resolve_gpu
from tightfit.wording import say


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
    gpu, notes = resolve_gpu(name, memory_bytes=memory_bytes, capability=capability)
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


def is_whole(value: object) -> bool:
    """Return True for a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
