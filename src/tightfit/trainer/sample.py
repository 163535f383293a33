"""Text from a trained model, one token after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tightfit.config import SampleConfig
from tightfit.data import Dataset, Tokenizer, load_tokenizer, read_meta
from tightfit.errors import ConfigError, DataError
from tightfit.models.attention import KeyValueCache
from tightfit.models.model import GPT, GPT2_VOCAB, GPTConfig
from tightfit.trainer.checkpoint import Checkpoint, load_best, restore_model
from tightfit.trainer.hardware import Hardware, choose_hardware
from tightfit.trainer.setup import starting_point


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """`prompt` (1, t) followed by `max_new_tokens` drawn from torch's default generator.

    Ids from `vocab_size` on are never drawn: a padded vocabulary has some that mean nothing.

    Keys and values are kept while the text is shorter than the model's block. Beyond that the window slides, as in
    nanoGPT, and with learnt positions every token of it changes: it is computed anew each time.
    """
    config: GPTConfig = model.config  # type: ignore[assignment]
    text, block_size = prompt, config.block_size
    cache: KeyValueCache | None = None
    for _ in range(max_new_tokens):
        if use_cache and text.shape[1] <= block_size:
            cache = cache or KeyValueCache(config.n_layer)
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
    """Ids of a prompt; ConfigError if there is none to begin with or the model does not know one."""
    ids = tokenizer.encode(start, allow_eot=True)
    if not ids:
        raise ConfigError("the prompt has no tokens; give some text with --start")
    if max(ids) >= vocab_size:
        raise ConfigError(
            f"the prompt has the token {max(ids)}, and the model knows {vocab_size}; is it the right dataset?"
        )
    return ids


def sample_text(model: GPT, dataset: Dataset, *, start: str, max_new_tokens: int, seed: int, hardware: Hardware) -> str:
    """One sample with nanoGPT's temperature 0.8 and top_k 200, as text."""
    tokenizer = load_tokenizer(dataset.meta, dataset.folder)
    ids = encode_prompt(tokenizer, start, model.config.vocab_size)
    torch.manual_seed(seed)
    model.eval()
    prompt = torch.tensor([ids], device=hardware.device)
    with hardware.autocast():
        drawn = generate(model, prompt, max_new_tokens, temperature=0.8, top_k=200, vocab_size=tokenizer.vocab_size)
    return tokenizer.decode(drawn[0].tolist())


def samples(config: SampleConfig, *, say: Callable[[str], object]) -> Iterator[str]:
    """The samples that `config` asks for, prompt included."""
    hardware = choose_hardware(config)
    start = (
        load_best(Path(config.out_dir), say=say)
        if config.init_from == "resume"
        else starting_point(config.init_from, config.out_dir, say=say)
    )
    assert start is not None, "SampleConfig refuses scratch"
    model = GPT.on_device(start.model_config, hardware.device)
    restore_model(model, start.model)
    model.eval()
    tokenizer = _tokenizer_of(start, config.data_dir)
    ids = encode_prompt(tokenizer, _prompt(config.start), model.config.vocab_size)
    prompt = torch.tensor([ids], device=hardware.device)
    called: nn.Module = torch.compile(model, dynamic=True) if hardware.compile else model  # type: ignore[assignment]
    torch.manual_seed(config.seed)
    with hardware.autocast():
        for _ in range(config.num_samples):
            drawn = generate(
                called,
                prompt,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                vocab_size=tokenizer.vocab_size,
            )
            yield tokenizer.decode(drawn[0].tolist())


def _tokenizer_of(start: Checkpoint, data_dir: str) -> Tokenizer:
    """The one of the dataset that the checkpoint names, if that is here; else GPT-2's, as nanoGPT."""
    name = str(start.config.get("dataset", ""))
    folder = Path(str(data_dir)) / name
    if name and folder.is_dir():
        return load_tokenizer(read_meta(folder), folder)
    if name and start.model_config.vocab_size < GPT2_VOCAB:
        raise DataError(
            f"{start.path} was trained on the dataset {name!r}, whose vocabulary is not in {folder}; "
            f"make it again with tightfit prepare {name}, or say where it is with --data_dir"
        )
    return load_tokenizer(None, folder)


def _prompt(start: str) -> str:
    """`start`, or what the file holds that it names as FILE:path."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"start={start}: the file cannot be read as UTF-8 text ({error})") from None
