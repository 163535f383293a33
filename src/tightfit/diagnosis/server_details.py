"""Details of failures of servers of language models: their share of the card, their requests, their weights."""

import re

import msgspec

from tightfit.diagnosis.usual_models import model_of, printed_name
from tightfit.oomlog.facts import Facts, with_detail
from tightfit.oomlog.run_facts import RunFacts
from tightfit.units import GIB

_HIGH_SHARE = re.compile(r"gpu[-_]memory[-_]utilization\W{1,3}(?:0?\.9[1-9]\d?|1\.0|1\b)")
"""A share of the card above vLLM's own 0.9."""
_USUAL_REQUESTS = 256
"""vLLM's own max_num_seqs on most cards."""
_FEW_TOKENS = 512
"""Tokens of prompts in one pass up to which not they, but the weights fill the card."""


def of_cache(facts: Facts, run: RunFacts) -> Facts:
    """Return a cache without memory with the figures that vLLM prints, or the size of 16-bit weights."""
    if _HIGH_SHARE.search(run.text):
        facts = with_detail(facts, "share_is_high")
    if (parts := _VLLM_PARTS.search(run.text)) is not None:
        facts = with_detail(facts, "printed_weights", f"{parts['weights']} GiB")
        facts = with_detail(facts, "printed_activations", f"{parts['activations']} GiB")
        return with_detail(facts, "in_share", f"{parts['share']} GiB")
    if (weights := _VLLM_WEIGHTS.search(run.text)) is not None:
        return with_detail(facts, "printed_weights", f"{weights[1]} GiB")
    model = model_of(run)
    is_half = not run.signs & {"quantized_4", "quantized_8", "spread"}
    if model is not None and model.parameters and is_half:
        facts = with_detail(
            with_detail(facts, "weights_of", printed_name(model, run)),
            "weights_size",
            f"{2 * model.parameters / GIB:.1f} GiB",
        )
    return facts


_VLLM_WEIGHTS = re.compile(r"(?:model weights took|Model loading took) (\d{1,4}\.\d{1,4}) ?(?:GiB|GB)\b")
"""Weights of one card; vLLM's older versions print GB for 2**30 bytes."""
_VLLM_PARTS = re.compile(
    r"gpu_memory_utilization \(\d\.\d{1,3}\) = (?P<share>\d{1,4}\.\d{1,3}) ?GiB(?s:.){1,120}?"
    r"model weights take (?P<weights>\d{1,4}\.\d{1,3}) ?GiB(?s:.){1,80}?"
    r"activation peak memory takes (?P<activations>\d{1,4}\.\d{1,3}) ?GiB[^\n]{1,60}? is -\d"
)
"""The share, and its parts, of a card that they exceed."""
_ASKS_FOR_SHARE = re.compile(
    r"(?:\b(?:is there|are there|any|how|(?:can|could|may|should) (?:i|we|one|you)|possible|(?:a|some) way|want"
    r"|would like|need)\b[^.?\n]{0,80}?\b(?:allocate|use|limit|cap|restrict|reserve|take|occupy)\b[^.?%\n]{0,40}?"
    r"(?P<en>\d{2}(?:\.\d)?) ?(?:%|percent)[^.?\n]{0,30}(?:\bmemory\b|\bv?ram\b|\bgpu\b)"
    r"|\b(?:limit|cap|restrict)\w*\b[^.?\n]{0,30}\b(?:memory|vram)\b[^.?%\n]{0,20}?\b(?:to|at)\b ?(?P<to>\d{2})"
    r" ?(?:%|percent)"
    r"|(?:限制|只(?:用|占|分配))[^。\n]{0,12}?(?P<zh>\d{2}) ?%"
    r"|(?P<ja>\d{2}) ?(?:%|％|パーセント)[^。\n]{0,10}(?:制限|だけ|まで))",
    re.IGNORECASE,
)
"""A person's question for a setting by which a program takes only a part of the card."""
_OWN_SHARE = frozenset({"vllm", "sglang", "tgi", "lmdeploy", "tensorflow", "jax", "paddle"})
"""Programs with a setting of their own for that."""


def share_asked(run: RunFacts) -> str | None:
    """Return the part of the card that the report wants a program to take, as a fraction."""
    asked = None if _OWN_SHARE.intersection(run.frameworks) else _ASKS_FOR_SHARE.search(run.text)
    return f"{float(asked[asked.lastgroup or 0]) / 100:g}" if asked else None


def of_warm_up(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of vLLM's warm-up with the number of requests to try next."""
    return with_detail(facts, "fewer", str(max(int(facts.details.get("count", _USUAL_REQUESTS)) // 4, 1)))


def of_prefill(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of TGI's first pass over few tokens, which are not what fills the card, or with its bound."""
    count = int(facts.details.get("count", "0"))
    if 0 < count <= _FEW_TOKENS:
        return with_detail(facts, "few")
    longest = _LONGEST_INPUT.search(run.text)
    if not count or longest is None:
        return facts
    facts = with_detail(facts, "longest_input", f"{longest[1]} {min(int(longest[2]), count // 2)}")
    return with_detail(facts, "prefill_half", str(count // 2))


_LONGEST_INPUT = re.compile(r"(--max-input-(?:length|tokens))[ =](\d{2,7})")
"""TGI's option for the longest prompt, which a prefill has to hold."""


_SGLANG_LEFT = re.compile(r"\bavail mem=([\d.]{1,8}) ?GB, mem usage=([\d.]{1,8}) ?GB")
_TOO_HIGH = 0.88
"""Share for weights and cache beside which few models have room for their activations."""


_LITTLE = 0.5
"""Part of the share that a server asks for below which what is free can hardly hold its model."""


def of_share(facts: Facts, run: RunFacts) -> Facts:
    """Return a share of the card that is not free, with the remark that far less is."""
    free, asked = facts.free_bytes, facts.requested_bytes
    return with_detail(facts, "far_less_free") if free and asked and free < _LITTLE * asked else facts


_OF_CACHE = 0.08
"""Share of the card for a cache of some use, beside that of the weights."""


def of_sglang(facts: Facts, run: RunFacts) -> Facts:
    """Return a cache of SGLang's without memory with the share that its weights alone need."""
    found = _SGLANG_LEFT.search(run.text)
    if found is None:
        return facts
    left, used = float(found[1]), float(found[2])
    bound = used / (left + used) if used else 0
    details = {"sglang_left": found[1], "sglang_used": found[2]}
    if bound < _TOO_HIGH:
        details |= {"sglang_above": f"{bound:.2f}", "sglang_share": f"{min(bound + _OF_CACHE, _TOO_HIGH):.2f}"}
    else:
        details |= {"sglang_bound": f"{bound:.3f}"}
    return msgspec.structs.replace(facts, details={**facts.details, **details})
