"""A SentencePiece model from the input text: quick, repeatable, and able to write any text."""

import io
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from s3_megatron.data.inputs import find_inputs
from s3_megatron.data.sources import BadDocument, read_documents, text_of
from s3_megatron.data.tokenizers import import_sentencepiece
from s3_megatron.errors import S3Error
from s3_megatron.files import write_file

# BPE merges change little after this many lines; more would only cost memory.
SAMPLED_LINES = 500_000
# Bytes. Longer lines (minified code) teach nothing; SentencePiece's own limit of 4,192 would drop paragraphs.
LONGEST_LINE = 1 << 16
# What byte fallback and the four special tokens take.
FIXED_PIECES = 256 + 4


def train_sentencepiece(
    inputs: Iterable[str | Path],
    model_prefix: str | Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    strict: bool = False,
) -> Path:
    """Train a BPE model on the inputs and write ``model_prefix``.model; returns that path.

    The same inputs give the same bytes. Lines are sampled, at most 500,000. No character is normalised, white
    space is kept (Python's indentation is meaning) and unknown characters fall back to bytes, so every text
    comes back as it went in, but for SentencePiece's own sign for a space (U+2581), which becomes one.
    Special ids: unk 0, bos 1, eos 2 (Megatron's end of document), pad 3 (Megatron masks pad out of the loss,
    so it must not be a token that occurs; megatron-core 0.19.2, core/datasets/gpt_dataset.py).
    Bad documents are left out here and counted by ``prepare``; ``strict`` raises at the first.
    Raises S3Error, also where the model exists already.
    """
    model = Path(f"{str(model_prefix).removesuffix('.model')}.model")
    if model.exists():
        raise S3Error(f"tokenizer model {model} exists: use it without --train-tokenizer, or delete it")
    if vocab_size <= FIXED_PIECES:
        raise S3Error(f"--vocab-size {vocab_size} is too small: bytes and special tokens alone take {FIXED_PIECES}")
    sentencepiece = import_sentencepiece()
    # A list first: SentencePiece turns every exception inside an iterator, Ctrl-C too, into a RuntimeError.
    lines = _sample(_lines(find_inputs(inputs).taken, json_key, strict))
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=trained,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise S3Error(_reason(str(error), vocab_size)) from error
    write_file(model, trained.getvalue())
    return model


def _lines(paths: list[Path], json_key: str, strict: bool) -> Iterator[str]:
    for document in read_documents(paths):
        try:
            text = text_of(document, json_key)
        except BadDocument as bad:
            if strict:
                raise bad.refusal() from None
            continue
        yield from filter(None, text.split("\n"))


def _sample(lines: Iterator[str]) -> list[str]:
    """At most SAMPLED_LINES of the lines, each with the same chance (reservoir sampling); repeatable."""
    chance = random.Random(0)
    kept: list[str] = []
    for seen, line in enumerate(lines):
        if seen < SAMPLED_LINES:
            kept.append(line)
        elif (place := chance.randrange(seen + 1)) < SAMPLED_LINES:
            kept[place] = line
    return kept


def _reason(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint (0.2.3) as advice."""
    if "too high" in message:
        limit = message.rsplit("<=", 1)[-1].strip(" .")
        return f"--vocab-size {vocab_size} is more than the text can fill: at most {limit}, or give more text"
    if "smaller than required_chars" in message:
        needed = message.split(" vs ")[-1].split(".")[0]
        return f"--vocab-size {vocab_size} is too small for the characters of the text: at least {needed}"
    if "!sentences_.empty()" in message:
        return "the input has no line to train a tokenizer on: check the files and --json-key"
    return f"SentencePiece cannot train a model: {' '.join(message.split())}"
