"""Explanations that commands print: of a log, of a dry run, of a run that failed for good."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from tightfit.config import TrainConfig, batch_split
from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.render import render
from tightfit.storage import EXPLANATION
from tightfit.wording import chosen_language, say
from tightfit.wording.diagnosis import words

_WIDEST = 110


def text_for_terminal(found: Explanation, *, verbose: bool = False) -> str:
    """Render an explanation to the terminal's width, at most 110 columns."""
    return render(found, words(found.language), verbose, min(_WIDEST, shutil.get_terminal_size().columns))


def explain_failed_run(message: str, config: TrainConfig, *, micro_batch: int | None) -> None:
    """Print why a training run ended, and keep it in `out_dir`; `micro_batch` is the last one that was tried."""
    size = min(micro_batch or batch_split(config).micro_batch, config.effective_batch)
    as_run = replace(config, batch_size=size, gradient_accumulation_steps=-(-config.effective_batch // size))
    found = explain(message, config=as_run, lang=chosen_language(None), config_names=(f"--batch_size={size}",))
    print(f"\n{text_for_terminal(found)}", flush=True)
    with contextlib.suppress(OSError):  # a full disk: it was printed
        folder = Path(config.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / EXPLANATION).write_text(render(found, words(found.language), True) + "\n", encoding="utf-8")
        print("\n" + say("explain.explained.kept", path=folder / EXPLANATION), flush=True)
