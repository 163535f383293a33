"""Datasets: making them, opening them, and their tokenizers."""

from tightfit.data.meta import Meta, read_meta
from tightfit.data.preparation import PrepareResult, prepare
from tightfit.data.tokenfile import Dataset, TokenFile, open_dataset
from tightfit.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Dataset",
    "Meta",
    "PrepareResult",
    "TokenFile",
    "Tokenizer",
    "load_tokenizer",
    "open_dataset",
    "prepare",
    "read_meta",
]
