"""The corpus as tokens: a SentencePiece model of it, and both splits in Megatron's format."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from s3_megatron.data import inspect, prepare, train_sentencepiece
from s3_megatron.data.prepare import Progress
from s3_megatron.demo.corpus import Corpus
from s3_megatron.jobs.process import Guarded
from s3_megatron.jobs.progress import print_line, stage_line
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
    model = corpus.folder / "tokenizer.model"
    if not model.exists():
        _train_tokenizer(corpus.train, model, vocabulary, console)
    counts = []
    for split in (corpus.train, corpus.validation):
        prefix = split.with_suffix("")
        if not prefix.with_suffix(".idx").exists():
            _encode(split, prefix, model, console)
        counts.append(inspect(prefix).tokens)
    print_line(console, f"tokens: {counts[0]:,} to train, {counts[1]:,} to validate, {vocabulary:,} in the vocabulary")
    folder = corpus.folder
    data = Data(train=str(folder / "train"), validation=str(folder / "validation"), tokenizer_model=str(model))
    return Tokens(data, *counts)


def _train_tokenizer(text: Path, model: Path, vocabulary: int, console: Console) -> None:
    """Have another process do it: SentencePiece does not return to Python for seconds, neither for a signal nor a bar.

    Nor does it report how far it is, so this stage has no total.
    """
    command = [sys.executable, "-m", __name__, str(text), str(model), str(vocabulary)]
    with stage_line(console, "tokenizer", None) as line:
        line.status(f"training a SentencePiece model of {vocabulary:,} pieces (5-30 s)")
        with Guarded(command, model.with_name("tokenizer.log"), os.environ) as child:
            while child.running():
                time.sleep(0.05)
            child.check("the tokenizer's training")


def _encode(split: Path, prefix: Path, model: Path, console: Console) -> None:
    with stage_line(console, f"encoding {split.stem}", split.stat().st_size) as line:

        def advance(now: Progress) -> None:
            line.advance(now.read, f"{now.documents} documents")

        prepare([split], prefix, tokenizer_model=model, append_eod=True, on_progress=advance)


if __name__ == "__main__":
    train_sentencepiece([sys.argv[1]], sys.argv[2], int(sys.argv[3]))
