"""Files of a Hugging Face folder, local or from the Hub: read with bounds, and never unpickled."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as brief
from typing import TypeAlias

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tightfit.errors import CheckpointError
from tightfit.wording import say

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_MAX_JSON_BYTES = 2**20
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def read_json(path: Path) -> dict[str, Json]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        content = json.loads(data) if len(data) <= _MAX_JSON_BYTES else None
    except OSError as error:
        raise CheckpointError(say("models.hub.no_json_file", path=path, reason=error.strerror)) from None
    except (ValueError, RecursionError):
        raise CheckpointError(say("models.hub.not_json", path=path)) from None
    if len(data) > _MAX_JSON_BYTES:
        raise CheckpointError(say("models.hub.too_long", path=path, most=_MAX_JSON_BYTES))
    if not isinstance(content, dict):
        raise CheckpointError(say("models.hub.no_object", path=path, found=type(content).__name__))
    return content


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, whole or in shards."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).exists() or not index.exists():
        if not (folder / WEIGHTS).exists() and (pickles := sorted(folder.glob("*.bin"))):
            raise CheckpointError(say("models.hub.pickled", folder=folder, file=pickles[0].name, name=WEIGHTS))
        return [folder / WEIGHTS]
    try:
        shards = sorted(set(msgspec.convert(read_json(index).get("weight_map"), dict[str, str]).values()))
    except msgspec.ValidationError:
        raise CheckpointError(say("models.hub.no_weight_map", path=index)) from None
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(say("models.hub.outside", path=index, file=brief(shard)))
    return [folder / shard for shard in shards]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with _reading(path):
            tensors |= load_file(path)
    return tensors


def tensor_names(folder: Path) -> Iterator[str]:
    """Yield the names of a folder's tensors without reading any."""
    for path in _weight_files(folder):
        with _reading(path), safe_open(path, framework="pt") as file:
            yield from file.keys()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(say("models.hub.unreadable", path=path, reason=error)) from None


def download(name: str) -> Path:
    """Return the Hugging Face cache folder with this model's files; download them if they are missing."""
    by_hand = say("models.hub.by_hand", name=name, config=CONFIG, weights=WEIGHTS)
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise CheckpointError(say("models.hub.no_hub", name=name, by_hand=by_hand)) from None
    # The first base is the error of the HTTP client below, which is another one in other versions of the Hub.
    failures: tuple[type[BaseException], ...] = (OSError, HfHubHTTPError.__bases__[0])
    reason = ""
    page = f"openai-community/{name}"
    for repository, cached in ((page, True), (name, True), (page, False)):
        try:
            paths = [hf_hub_download(repository, file, local_files_only=cached) for file in (CONFIG, WEIGHTS)]
            return Path(paths[0]).parent
        except failures as error:
            reason = type(error).__name__
    raise CheckpointError(say("models.hub.not_fetched", name=name, reason=reason, by_hand=by_hand))
