"""The corpus as tokens: a SentencePiece model of it, and both splits in Megatron's format."""

from dataclasses import dataclass

from rich.console import Console

from s3_megatron.data import inspect, prepare, train_sentencepiece
from s3_megatron.demo.corpus import Corpus
from s3_megatron.jobs.recipe import Data


@dataclass(frozen=True)
class Tokens:
    """What a recipe says about the data, and how many tokens each split has."""

    data: Data
    train: int
    validation: int


def tokenize(corpus: Corpus, vocabulary: int, console: Console) -> Tokens:
    """Train the tokenizer of ``vocabulary`` pieces and write ``train`` and ``validation`` .bin/.idx beside the corpus.

    Whatever is there already is used: none of these files ever exists in part.
    """
    folder = corpus.folder
    model = folder / "tokenizer.model"
    if not model.exists():
        with console.status(f"training a SentencePiece model of {vocabulary:,} pieces (15-30 s)"):
            train_sentencepiece([corpus.train], model, vocabulary)
    counts = []
    for split in (corpus.train, corpus.validation):
        prefix = split.with_suffix("")
        if not prefix.with_suffix(".idx").exists():
            with console.status(f"encoding {split.name}"):
                prepare([split], prefix, tokenizer_model=model, append_eod=True)
        counts.append(inspect(prefix).tokens)
    console.print(f"tokens: {counts[0]:,} to train, {counts[1]:,} to validate, {vocabulary:,} in the vocabulary")
    data = Data(train=str(folder / "train"), validation=str(folder / "validation"), tokenizer_model=str(model))
    return Tokens(data, *counts)
