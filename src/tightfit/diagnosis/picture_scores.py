"""Attention scores of a latent diffusion model, from the sizes of pictures that a report names."""

import itertools
import re

from tightfit.diagnosis.tensor_fits import Fit, Range
from tightfit.oomlog.run_facts import RunFacts

_SIDES = re.compile(r"(?<![\d.])(\d{3,4}) ?[x×*] ?(\d{3,4})(?![\d.])")
"""Width and height of a picture, in pixels."""
_LATENT = 8
"""Pixels of a side that are one latent's, of which each attends to each."""
_HEADS = (8, 5, 10)
"""Heads at the largest resolution: Stable Diffusion 1, 2, and SDXL."""
_BATCHES = (1, 2)
"""Pictures of one pass: with guidance each is there twice, with and without its prompt."""
_TYPES = (("float16", 2), ("float32", 4))
_DRAWS = frozenset(
    {"webui", "forge", "comfyui", "invokeai", "fooocus", "diffusers", "diffusers_pipeline", "stable_diffusion"}
)
"""Programs that draw with such models."""
_LEAST = 2**30
"""Bytes below which many other tensors may have the size, too."""


def picture_scores(run: RunFacts, within: Range) -> Fit | None:
    """Return the scores (batch, heads, latents, latents) that make the request for a picture of the report."""
    if within.low < _LEAST or not _DRAWS.intersection(run.frameworks):
        return None
    sides = {(int(width), int(height)) for width, height in _SIDES.findall(run.text)}
    counts = {(width // _LATENT) * (height // _LATENT) for width, height in sides}
    for tokens, heads, batch, (dtype, size) in itertools.product(sorted(counts), _HEADS, _BATCHES, _TYPES):
        needed = batch * heads * tokens * tokens * size
        if within.holds(needed):
            shape = (batch, heads, tokens, tokens)
            return Fit(tensor="attention_scores", shape=shape, dtype=dtype, bytes=needed)
    return None
