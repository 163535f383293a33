"""Texts that transformers generates come to their greatest length, and later ones do not take their time again."""

from pathlib import Path

import pytest
from plays import findings, simulator

from tightfit.simulation.dry_run import dryrun_script
from tightfit.vgpu.records import Findings, Settings

GENERATES = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sizes = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, eos_token_id=2, pad_token_id=3)).cuda()
passes = []
model.register_forward_hook(lambda *_: passes.append(1))

def generate(rows, prompt, tokens, **more):
    passes.clear()
    ids = torch.randint(5, 999, (rows, prompt)).cuda()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, **more)
    return len(passes), tuple(getattr(out, "sequences", out).shape)

assert generate(4, 10, 20) == (20, (4, 30)), "no made-up token ends a text"
assert generate(4, 8, 20) == (SHORT or 20, (4, 28)), "a shorter one takes less memory"
assert generate(8, 10, 20) == (2 * SHORT or 20, (8, 30))
assert generate(4, 12, 20) == (2 * SHORT or 20, (4, 32)), "a longer one takes more"
assert generate(4, 10, 20, return_dict_in_generate=True, output_scores=True) == (20, (4, 30)), "scores stay"
held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
assert generate(4, 10, 20) == (2 * SHORT or 20, (4, 30)), "beside more memory"
assert generate(4, 10, 20) == (SHORT or 20, (4, 30))
del held
assert generate(16, 10, 300) == (2 * SHORT or 300, (16, 310)), "its first and last tokens"
"""
WITHOUT_CACHE = """
assert generate(16, 10, 300, use_cache=False) == (128 if SHORT else 300, (16, 310)), "each token of all before it"
"""


def generated(folder: Path, *, shortened: bool, more: str = "") -> Findings:
    script = folder / "train.py"
    script.write_text((GENERATES + more).replace("SHORT", "4" if shortened else "0"))
    found = dryrun_script(str(script), [], Settings(gpu="A100", until_stable=shortened), simulator=simulator())
    assert found.outcome == "fits", found.stopped_because
    return found


def test_texts_come_to_their_greatest_length(tmp_path: Path) -> None:
    found = generated(tmp_path, shortened=True)
    assert any("were not played" in note and "transformers" in note for note in found.notes)


@pytest.mark.slow
def test_tokens_that_are_not_played_take_no_more_memory(tmp_path: Path) -> None:
    """But for a few numbers of 8 bytes for each."""
    found, whole = (generated(tmp_path, shortened=shortened, more=WITHOUT_CACHE) for shortened in (True, False))
    assert found.peak.allocated_bytes == pytest.approx(whole.peak.allocated_bytes, rel=3e-3)


BEAMS = """
import torch
from transformers import T5Config, T5ForConditionalGeneration

sizes = dict(vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
model = T5ForConditionalGeneration(T5Config(**sizes)).cuda()
passes = []
model.register_forward_hook(lambda *_: passes.append(1))
model.generate(torch.randint(5, 400, (4, 10)).cuda(), max_new_tokens=24, num_beams=4)
assert len(passes) == 24, len(passes)
"""


@pytest.mark.slow
def test_beams_stay_open(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(BEAMS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]


LENGTHS = """
import torch

ids = torch.randint(5, 9, (4, 3)).cuda()
lengths = ids.new(4)
for row in range(4):
    lengths[row] = 5 + row
decoded = ids.new(4, min(lengths.max().item() + 1, 25)).fill_(0)
for row in range(4):
    decoded[row, : lengths[row]] = torch.ones(5 + row, device="cuda", dtype=torch.int64)
"""
PLACES = """
import torch

values = torch.rand(12, device="cuda")
places = torch.where(values.log() > values)[0].add_(1).tolist()
assert places == list(range(1, 13)), "true everywhere"
"""


@pytest.mark.parametrize("script", [LENGTHS, PLACES])
def test_lengths_and_places_hold_together(tmp_path: Path, script: str) -> None:
    """As transformers 4 ends a beam search, and Whisper looks for timestamps."""
    (tmp_path / "train.py").write_text(script)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
