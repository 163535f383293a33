"""Sizes of usual models, from their public configurations, and the model that a log names or describes."""

import csv
import functools
import re
from collections.abc import Iterator
from importlib.resources import files

import msgspec

from tightfit.oomlog.run_facts import RunFacts

_SEPARATORS = re.compile(r"[\s_./:]+")
_BETWEEN_WORDS, _INSIDE = re.compile(r"[\s/:\"'`(]+"), re.compile(r"[_.]")
_ALONE = "(?<!"
"""Beginning of the patterns of names that other names end with: t5-base, which is not flan-t5-base."""
_LEAST_PARAMETERS = 1_000_000


_MERGED = ("phi3", "chatglm")
"""Families whose weights that read the same input are one matrix."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one model; a size that is unknown is None."""

    name: str
    family: str = ""
    kind: str = ""
    """causal, vision_language, encoder, seq2seq, vision, convolutional or diffusion."""
    parameters: int | None = None
    hidden: int | None = None
    inner: int | None = None
    """Channels inside an MLP."""
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    vocabulary: int | None = None
    gated: bool = False
    """True if the MLP has a gate: three matrices instead of two."""
    experts: int = 1
    """MLPs of each layer."""
    tied: bool = False
    """True if the embedding and the output layer are one matrix."""
    printed: bool = False
    """True if the log prints the sizes."""
    is_by_name: bool = False
    """True if the number of parameters is the one in its name: 33B."""

    def matrices(self, *, merged: bool = False) -> Iterator[tuple[int, ...]]:
        """Yield the shape of each kind of large weight; `merged` as servers hold those that read the same input."""
        hidden, inner = self.hidden, self.inner
        if self.vocabulary and hidden:
            yield self.vocabulary, hidden
        if hidden and inner:
            yield from ((inner, hidden), (hidden, inner))
            if self.gated and (merged or self.family in _MERGED):  # gate_up_proj
                yield 2 * inner, hidden
        if hidden and self.heads and self.head_dim:
            rows = self.heads * self.head_dim
            if merged or self.family == "chatglm":  # qkv_proj
                yield rows + 2 * (self.kv_heads or self.heads) * self.head_dim, hidden
            yield rows, hidden
            if rows != hidden:
                yield hidden, rows
            if self.kv_heads and self.kv_heads != self.heads:
                yield self.kv_heads * self.head_dim, hidden

    @property
    def counted(self) -> int | None:
        """Parameters of the large matrices of a decoder, where nothing states them."""
        hidden, inner, layers = self.hidden, self.inner, self.layers
        if not (hidden and inner and layers and self.vocabulary and self.heads and self.head_dim):
            return None
        rows, keys = self.heads * self.head_dim, (self.kv_heads or self.heads) * self.head_dim
        attention = 2 * hidden * rows + 2 * hidden * keys
        mlp = self.experts * (3 if self.gated else 2) * hidden * inner
        return layers * (attention + mlp) + (1 if self.tied else 2) * self.vocabulary * hidden


@functools.cache
def usual_models() -> tuple[tuple[re.Pattern[str], Model], ...]:
    """Return each model with the pattern of its names."""
    found = []
    with files("tightfit.diagnosis").joinpath("usual_models.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            given = {name: value for name, value in row.items() if value and name not in ("pattern", "source")}
            found.append((re.compile(row["pattern"]), msgspec.convert(given, Model, strict=False)))
    return tuple(found)


def all_models() -> Iterator[Model]:
    """Return the models of the table."""
    return (model for _, model in usual_models())


_ALIKE = 0.01
"""Share by which the vocabularies of one family differ where its sizes round it up differently."""


def vocabulary_of(family: str | None) -> int | None:
    """Return the words of a family of models, by its file's name, if all its models have about as many.

    >>> vocabulary_of("qwen2"), vocabulary_of("llama")
    (151936, None)
    """
    known = sorted(each.vocabulary for each in all_models() if each.family == family and each.vocabulary)
    return known[0] if known and known[-1] <= (1 + _ALIKE) * known[0] else None


def model_of(run: RunFacts) -> Model | None:
    """Return the model of a run: by its printed sizes, the key that names it, or the only name in the text."""
    named = _named(run.texts.get("model", ""))
    if named is None:
        in_text = {model.name: model for model in named_in(run.text)}
        named = next(iter(in_text.values())) if len(in_text) == 1 else None
    named = _of_printed_count(named, run)
    if named is not None and (vocabulary := run.numbers.get("vocabulary")) is not None:
        named = _with_vocabulary(named, vocabulary)
    printed = _printed(run)
    if (printed is None or printed.hidden is None) and (counted := _by_count(run, named)) is not None:
        return counted
    if printed is not None and not (named and named.hidden == printed.hidden):
        return printed
    sized = _by_size_in_name(run)
    return sized if named is None or (sized is not None and _is_other_size(sized, named)) else named


def _with_vocabulary(model: Model, printed: int) -> Model:
    """Return the model with the printed vocabulary, if that is its own, rounded up."""
    is_own = model.vocabulary is not None and model.vocabulary <= printed <= (1 + _ALIKE) * model.vocabulary
    return msgspec.structs.replace(model, vocabulary=printed) if is_own else model


_COUNT = re.compile(r"\bnumber of parameters: ?(\d{1,6}(?:\.\d{1,3})?)M\b")
"""nanoGPT's line on its model, without the embedding of positions."""
_ROUNDED = 0.02
"""Share by which such a number differs from the whole one."""


def _of_printed_count(named: Model | None, run: RunFacts) -> Model | None:
    """Return the model of the named one's family that has the printed number of parameters; None if none has it."""
    printed = _COUNT.search(run.text)
    if named is None or named.parameters is None or printed is None:
        return named
    count = float(printed[1]) * 10**6
    family = (each for each in (named, *all_models()) if each.family == named.family)
    return next((each for each in family if abs((each.parameters or 0) - count) <= _ROUNDED * count), None)


def _by_count(run: RunFacts, named: Model | None) -> Model | None:
    """Return the usual model with exactly the parameters that a log counts, without those of adapters; None if none.

    A named model of this count comes before others of its sizes.
    """
    numbers = run.numbers
    parameters, trained = numbers.get("parameters", 0), numbers.get("trainable", 0)
    counts = {parameters, parameters - trained if trained < parameters else trained}
    alike = [each for each in all_models() if each.hidden and each.parameters in counts]
    return named if named in alike else next(iter(alike), None)


def _is_other_size(sized: Model, named: Model) -> bool:
    """Return True if a name of a usual model stands with another size behind it: gpt2(2.6B)."""
    known, stated = named.parameters or 0, sized.parameters or 0
    return named in named_in(sized.name) and not known / 2 < stated < 2 * known


_SIZE = r"(?:\d{1,2}x)?\d{1,3}(?:\.\d{1,2})?[bB](?![a-zA-Z0-9])"
_SIZED_NAME = re.compile(
    rf"(?<![A-Za-z0-9.])[A-Za-z][A-Za-z0-9.]{{1,30}}(?:[-_][A-Za-z0-9.]{{1,20}}){{0,5}}?[-_]({_SIZE})"
    r"(?:[-_][A-Za-z0-9.]{1,20}){0,6}"
)
_SIZED_WORDS = re.compile(
    r"\b((?:gpt(?:-?2|-?j|-neox?)?|llama|qwen|mistral|gemma|opt|falcon|yi|baichuan|chatglm|glm|vicuna|deepseek|granite|bloom|mpt|internlm"
    rf"|internvl|pythia|starcoder|codellama|galactica)[\w.]{{0,5}}"
    rf"(?:[ -][A-Za-z\d.]{{1,10}}){{0,2}}?(?:[ -]| ?\()({_SIZE}))",
    re.IGNORECASE,
)
"""Names of models with their billions of parameters, in one piece and as people write them."""
_SCALE = re.compile(r"(?:^|[-_])(?:x[1-8]|[1-8]x)(?:plus)?(?:[-_.]|$)", re.IGNORECASE)
"""The scale in the name of a network that enlarges pictures: its other numbers count blocks."""
_BILLION = 10**9


def _by_size_in_name(run: RunFacts) -> Model | None:
    """Return a model with the parameters that its name states, where all names in the text state the same.

    >>> _by_size_in_name(RunFacts(text="deepseek-coder-33b-instruct on 8 cards")).parameters
    33000000000
    """
    given = run.texts.get("model", "")
    found = [(match[0], match[1]) for match in _SIZED_NAME.finditer(given) if not _SCALE.search(match[0])]
    if not found:
        found = [(match[0], match[1]) for match in _SIZED_NAME.finditer(run.text) if not _SCALE.search(match[0])]
        found += [(match[1], match[2]) for match in _SIZED_WORDS.finditer(run.text)]
    sizes = {size.lower() for _, size in found}
    if len(sizes) != 1 or "x" in (size := sizes.pop()):
        return None
    name = found[0][0]
    name += ")" * (name.count("(") - name.count(")"))
    return Model(name=name, parameters=round(float(size[:-1]) * _BILLION), is_by_name=True)


def _named(text: str) -> Model | None:
    return next(named_in(text), None)


def named_in(text: str) -> Iterator[Model]:
    """Yield the models that a text names."""
    joined = _SEPARATORS.sub("-", text.lower())
    apart = _INSIDE.sub("-", _BETWEEN_WORDS.sub(" ", text.lower()))
    for pattern, model in usual_models():
        if pattern.search(apart if pattern.pattern.startswith(_ALONE) else joined):
            yield model


def printed_name(model: Model, run: RunFacts) -> str:
    """Return a model's name, as the run prints it where that is another one of the same sizes.

    >>> printed_name(next(named_in("Qwen2-7B-Instruct")), RunFacts(text="serve Qwen/Qwen2-7B-Instruct"))
    'Qwen2-7B'
    """
    pattern = next((each for each, known in usual_models() if known.name == model.name), None)
    text = f"{run.texts.get('model', '')}\n{run.text}"
    joined = _SEPARATORS.sub("-", text.lower())
    match = pattern.search(joined) if pattern else None
    if match is None:
        return model.name
    words = r"[^A-Za-z0-9\n]{0,3}".join(map(re.escape, filter(None, match[0].split("-"))))
    printed = re.search(words, text, re.IGNORECASE)
    is_same = printed is None or _plain(printed[0]) == _plain(model.name)
    return model.name if printed is None or is_same else printed[0]


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


_LLAMA_PARAMS = re.compile(
    r"[\"']dim[\"']: ?(?P<dim>\d{2,6})\b(?=[^{}\n]{0,200}[\"']multiple_of[\"'])"
    r"[^{}\n]{0,200}[\"']n_layers[\"']: ?(?P<layers>\d{1,3})\b"
)
"""Sizes of a Llama in the form of Meta's params.json."""


def _is_llama(model: Model, hidden: int, layers: int) -> bool:
    return model.family == "llama" and (model.hidden, model.layers) == (hidden, layers)


def _printed(run: RunFacts) -> Model | None:
    """Return a model of the sizes that the log prints."""
    if (params := _LLAMA_PARAMS.search(run.text)) is not None:
        layers = int(params["layers"])
        return next((each for each in all_models() if _is_llama(each, int(params["dim"]), layers)), None)
    numbers = run.numbers
    hidden, parameters = numbers.get("hidden"), numbers.get("parameters")
    if not (hidden and (numbers.get("inner") or numbers.get("vocabulary"))):
        return Model(name="", parameters=parameters, printed=True) if _is_count(parameters) else None
    heads = numbers.get("heads")
    model = Model(
        name=run.texts.get("model", ""),
        kind="causal",
        parameters=parameters if _is_count(parameters) else None,
        hidden=hidden,
        inner=numbers.get("inner"),
        layers=numbers.get("layers"),
        heads=heads,
        kv_heads=numbers.get("kv_heads") or heads,
        head_dim=hidden // heads if heads else None,
        vocabulary=numbers.get("vocabulary"),
        gated=bool(re.search(r"silu|swiglu|[Ll]lama|[Qq]wen|[Mm]istral|[Gg]emma", run.text)),
        printed=True,
    )
    alike = [
        usual
        for _, usual in usual_models()
        if (usual.hidden, usual.inner) == (model.hidden, model.inner) and model.vocabulary in (None, usual.vocabulary)
    ]
    if len(alike) == 1 and model.layers in (None, alike[0].layers):
        return msgspec.structs.replace(alike[0], printed=True)
    return model


def _is_count(parameters: int | None) -> bool:
    return bool(parameters and parameters >= _LEAST_PARAMETERS)
