"""What a dataset holds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3_megatron.data.index import read_index
from s3_megatron.data.tokenizers import load_tokenizer
from s3_megatron.data.writer import bin_and_idx
from s3_megatron.errors import S3Error

SAMPLE_TOKENS = 100


@dataclass(frozen=True)
class InspectReport:
    """A dataset in numbers; lengths are tokens a document, the sample is the start of the first that has any."""

    documents: int
    tokens: int
    dtype: str
    shortest: int
    median: float
    longest: int
    sample_ids: list[int]
    sample_text: str | None


def inspect(
    prefix: str | Path, tokenizer: str = "sentencepiece", tokenizer_model: str | Path | None = None
) -> InspectReport:
    """Read ``prefix``.bin and .idx; the sample is decoded where a tokenizer is named.

    Raises S3Error where a file is missing, is cut off, or does not fit the other or the tokenizer.
    """
    data, path = bin_and_idx(prefix)
    dtype, lengths, documents = read_index(prefix)
    if len(documents) < 2 or not len(lengths):
        raise S3Error(f"{path} lists no document: prepare it again")
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    sizes = np.diff(ends)
    if sizes.min() < 0:
        raise S3Error(f"{path} is damaged: a document begins before the one before it; prepare it again")
    if not sizes.any():
        raise S3Error(f"{data} holds no token in {len(sizes)} documents: prepare it again")
    try:
        tokens = np.memmap(data, dtype=dtype, mode="r")
    except OSError as error:
        raise S3Error(f"{data} cannot be read: {error.strerror or error}") from error
    start = ends[int(np.argmax(sizes > 0))]
    sample = tokens[start : start + min(int(sizes[sizes > 0][0]), SAMPLE_TOKENS)].tolist()
    text = None
    if tokenizer_model is not None or tokenizer != "sentencepiece":
        if dtype.kind == "f":
            raise S3Error(f"{data} holds {dtype.name}, which no tokenizer decodes: leave the tokenizer out")
        loaded = load_tokenizer(tokenizer, tokenizer_model)
        if wrong := [one for one in sample if one not in range(loaded.vocab_size)]:
            raise S3Error(
                f"{data} holds token {wrong[0]} and the tokenizer {tokenizer_model or tokenizer} has only "
                f"{loaded.vocab_size}: it was written with another tokenizer"
            )
        text = loaded.decode(sample)
    return InspectReport(
        documents=len(sizes),
        tokens=len(tokens),
        dtype=dtype.name,
        shortest=int(sizes.min()),
        median=float(np.median(sizes)),
        longest=int(sizes.max()),
        sample_ids=sample,
        sample_text=text,
    )
