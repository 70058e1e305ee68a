"""What a dataset holds, read without Megatron: its import takes ten seconds, this takes none."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3_megatron.data.tokenizers import load_tokenizer
from s3_megatron.data.writer import bin_and_idx
from s3_megatron.errors import S3Error

# megatron-core 0.19.2, core/datasets/indexed_dataset.py: _INDEX_HEADER, _IndexWriter, DType.
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}
SAMPLE_TOKENS = 100


@dataclass(frozen=True)
class InspectReport:
    """A dataset in numbers; lengths are tokens a document, the sample is the start of the first document."""

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
    data, index = bin_and_idx(prefix)
    for path in (index, data):
        if not path.is_file():
            raise S3Error(
                f"{path} is missing: give the PREFIX of a .bin and an .idx, or run `s3-megatron data prepare`"
            )
    dtype, lengths, documents = _read_index(index)
    expected = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if data.stat().st_size != expected:
        raise S3Error(
            f"{data} has {data.stat().st_size} bytes where its .idx promises {expected}: it is cut off or "
            "belongs to another .idx; prepare it again"
        )
    if len(documents) < 2 or not expected:
        raise S3Error(f"{index} lists no document: prepare it again")
    tokens = np.memmap(data, dtype=dtype, mode="r")
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    sizes = np.diff(ends)
    sample = tokens[ends[0] : min(ends[1], ends[0] + SAMPLE_TOKENS)].tolist()
    text = None
    if tokenizer_model is not None or tokenizer != "sentencepiece":
        loaded = load_tokenizer(tokenizer, tokenizer_model)
        if max(sample) >= loaded.vocab_size:
            raise S3Error(
                f"{data} holds token {max(sample)} and the tokenizer {tokenizer_model or tokenizer} has only "
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


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """The dtype of the tokens, the lengths of the sequences (int32), the first sequence of each document."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise S3Error(f"{path} is no index of Megatron's, or is cut off: prepare it again")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise S3Error(f"{path} has version {version} and dtype code {code}: version 1 and codes 1 to 8 are known")
        body = path.stat().st_size - HEADER.size
        if body < sequences * (4 + 8) + documents * 8:
            raise S3Error(f"{path} is cut off: {body} bytes of {sequences * 12 + documents * 8}; prepare it again")
        lengths = np.fromfile(file, np.int32, sequences)
        file.seek(sequences * 8, 1)
        return np.dtype(DTYPES[code]), lengths, np.fromfile(file, np.int64, documents)
