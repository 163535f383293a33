"""Draw text from a trained model, one token after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tightfit.config import SampleConfig
from tightfit.data import Dataset, Tokenizer, load_tokenizer, read_meta
from tightfit.data.tokenfile import preparation
from tightfit.errors import ConfigError, DataError
from tightfit.models.attention import KeyValueCache
from tightfit.models.model import GPT, GPT2_VOCAB
from tightfit.trainer.checkpoint import Checkpoint, refuse_not_finite, restore_model
from tightfit.trainer.hardware import Hardware, choose_hardware, set_process_options
from tightfit.trainer.setup import Log, starting_point
from tightfit.trainer.stored import load_best
from tightfit.wording import say


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Return `prompt` (1, t) followed by `max_new_tokens` drawn from torch's default generator.

    Never draws ids from `vocab_size` on: a padded vocabulary has some that mean nothing.

    Keys and values are kept while the text is shorter than the model's block. Beyond that the window slides, as in
    nanoGPT: with learnt positions each of its tokens changes, so the whole window is computed anew each time.
    """
    text, block_size = prompt, model.config.block_size
    cache: KeyValueCache | None = None
    for _ in range(max_new_tokens):
        if text.shape[1] <= block_size:
            cache = cache or KeyValueCache(model.config.n_layer)
            logits = model(text[:, cache.length :], cache=cache)
        else:
            logits = model(text[:, -block_size:])
        drawn = _draw(logits[:, :vocab_size].float() / temperature, top_k)
        text = torch.cat((text, drawn), dim=1)
    return text


def _draw(logits_bv: Tensor, top_k: int | None) -> Tensor:
    if top_k is not None and top_k < logits_bv.shape[1]:
        least = logits_bv.topk(top_k).values[:, -1:]
        logits_bv = logits_bv.masked_fill(logits_bv < least, -torch.inf)
    return torch.multinomial(torch.softmax(logits_bv, dim=-1), num_samples=1)


def encode_prompt(tokenizer: Tokenizer, start: str, vocab_size: int) -> list[int]:
    """Return the ids of a prompt; ConfigError if it is empty or has an id beyond the model's vocabulary."""
    ids = tokenizer.encode(start, allow_eot=True)
    if not ids:
        raise ConfigError(say("trainer.sample.empty_prompt"))
    if max(ids) >= vocab_size:
        raise ConfigError(say("trainer.sample.unknown_token", token=max(ids), vocab_size=vocab_size))
    return ids


def sample_text(model: GPT, dataset: Dataset, config: SampleConfig, hardware: Hardware) -> str:
    """Draw the first sample that `config` asks for from a model in memory."""
    model.eval()
    return next(_texts(model, load_tokenizer(dataset.meta, dataset.folder), config.start, config, hardware))


def samples(config: SampleConfig, *, log: Log) -> Iterator[str]:
    """Yield the samples that `config` asks for, prompt included."""
    hardware = choose_hardware(config)
    set_process_options(hardware)
    start = (
        load_best(Path(config.out_dir), log=log)
        if config.init_from == "resume"
        else starting_point(config.init_from, config.out_dir, log=log)
    )
    assert start is not None, "SampleConfig refuses scratch"
    refuse_not_finite(start)
    model = GPT.on_device(start.model_config, hardware.device)
    restore_model(model, start.model)
    model.eval()
    called = cast(GPT, torch.compile(model, dynamic=True)) if hardware.compile else model  # forwards attributes
    yield from _texts(called, _tokenizer_of(start, config.data_dir), _prompt(config.start), config, hardware)


def _texts(model: GPT, tokenizer: Tokenizer, start: str, config: SampleConfig, hardware: Hardware) -> Iterator[str]:
    """Yield samples that begin with `start`; seeds torch's default generator."""
    ids = encode_prompt(tokenizer, start, model.config.vocab_size)
    prompt = torch.tensor([ids], device=hardware.device)
    torch.manual_seed(config.seed)
    with hardware.autocast():
        for _ in range(config.num_samples):
            drawn = generate(
                model,
                prompt,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                vocab_size=tokenizer.vocab_size,
            )
            yield tokenizer.decode(drawn[0].tolist())


def _tokenizer_of(start: Checkpoint, data_dir: str) -> Tokenizer:
    """Load the tokenizer of the dataset that the checkpoint names, if that is here; else GPT-2's, as nanoGPT."""
    name = str(start.config.get("dataset", ""))
    folder = Path(data_dir) / name
    if name and folder.is_dir():
        return load_tokenizer(read_meta(folder), folder)
    if name and start.model_config.vocab_size < GPT2_VOCAB:
        said = {"path": start.path, "name": name, "folder": folder, "command": preparation(folder)}
        raise DataError(say("trainer.sample.no_vocabulary", **said))
    return load_tokenizer(None, folder)


def _prompt(start: str) -> str:
    """Return `start`, or the text of the file that it names as FILE:path."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(say("trainer.sample.unreadable_prompt", start=start, reason=error)) from None
