"""Text to Megatron's ``.bin``/``.idx``: read, tokenize, write, inspect. Its import brings no torch."""

from s3_megatron.data.inspection import InspectReport, inspect
from s3_megatron.data.prepare import PrepareReport, Progress, prepare
from s3_megatron.data.tokenizer_training import train_sentencepiece
from s3_megatron.data.tokenizers import load_tokenizer

__all__ = [
    "InspectReport",
    "PrepareReport",
    "Progress",
    "inspect",
    "load_tokenizer",
    "prepare",
    "train_sentencepiece",
]
