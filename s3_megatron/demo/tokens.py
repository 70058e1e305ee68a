"""The corpus as tokens: a SentencePiece model of it, and both splits in Megatron's format."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from s3_megatron.data import inspect, load_tokenizer, prepare, train_sentencepiece
from s3_megatron.demo.corpus import Corpus

VOCABULARY = 4096


@dataclass(frozen=True)
class Tokens:
    """What Megatron is told about the data, and how many tokens each split has."""

    flags: list[str]
    train: int
    validation: int


def tokenize(corpus: Corpus, console: Console) -> Tokens:
    """Train the tokenizer and write ``train`` and ``validation`` .bin/.idx beside the corpus.

    Whatever is there already is used: none of these files ever exists in part.
    """
    folder = corpus.folder
    model = folder / "tokenizer.model"
    if not model.exists():
        with console.status(f"training a SentencePiece model of {VOCABULARY:,} pieces (15-30 s)"):
            train_sentencepiece([corpus.train], model, VOCABULARY)
    counts = []
    for split in (corpus.train, corpus.validation):
        prefix = split.with_suffix("")
        if not prefix.with_suffix(".idx").exists():
            with console.status(f"encoding {split.name}"):
                prepare([split], prefix, tokenizer_model=model, append_eod=True)
        counts.append(inspect(prefix).tokens)
    console.print(f"tokens: {counts[0]:,} to train, {counts[1]:,} to validate, {VOCABULARY:,} in the vocabulary")
    return Tokens(_flags(folder, model), *counts)


def _flags(folder: Path, model: Path) -> list[str]:
    return [
        *load_tokenizer("sentencepiece", model).megatron_flags,
        *("--train-data-path", str(folder / "train")),
        *("--valid-data-path", str(folder / "validation")),
    ]
