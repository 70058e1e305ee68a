"""Megatron's .idx, read without Megatron: its import takes ten seconds, this takes none."""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s3_megatron.data.writer import bin_and_idx
from s3_megatron.errors import S3Error

# megatron-core 0.19.2, core/datasets/indexed_dataset.py: _INDEX_HEADER, _IndexWriter, DType.
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}
_OLD_MAGIC = b"TNTIDX\x00\x00"  # Megatron-LM before 2020, and fairseq


class Index(NamedTuple):
    """The dtype of the tokens, the lengths of the sequences (int32), the first sequence of each document (int64).

    Both arrays are maps of the file: a data set may have a billion of them.
    """

    dtype: np.dtype
    lengths: np.ndarray
    documents: np.ndarray


def read_index(prefix: str | Path) -> Index:
    """Read ``prefix``.idx, and compare it with the size of ``prefix``.bin.

    Raises S3Error where a file is missing, may not be read, is cut off, or does not fit the other.
    """
    data, path = bin_and_idx(prefix)
    try:
        for file in (path, data):
            if not file.is_file():
                raise S3Error(
                    f"{file} is {'no file' if file.exists() else 'missing'}: give the PREFIX of a .bin and an .idx, "
                    "or run `s3-megatron data prepare`"
                )
        index, size = _read(path), data.stat().st_size
    except OSError as error:
        raise S3Error(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    expected = int(index.lengths.sum(dtype=np.int64)) * index.dtype.itemsize
    if size != expected:
        raise S3Error(
            f"{data} has {size} bytes where its .idx promises {expected}: it is cut off or belongs to another .idx; "
            "prepare it again"
        )
    return index


def _read(path: Path) -> Index:
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if header.startswith(_OLD_MAGIC):
            raise S3Error(f"{path} is in the format of 2019, which Megatron no longer reads: prepare it again")
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise S3Error(f"{path} is no index of Megatron's, or is cut off: prepare it again")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise S3Error(f"{path} has version {version} and dtype code {code}: version 1 and codes 1 to 8 are known")
        body = path.stat().st_size - HEADER.size
        if body < sequences * (4 + 8) + documents * 8:
            raise S3Error(f"{path} is cut off: {body} bytes of {sequences * 12 + documents * 8}; prepare it again")
    lengths = _mapped(path, np.int32, HEADER.size, sequences)
    starts = _mapped(path, np.int64, HEADER.size + sequences * 12, documents)
    if min(lengths.min(initial=0), starts.min(initial=0)) < 0 or starts.max(initial=0) > sequences:
        raise S3Error(f"{path} is damaged: its lengths or documents are no such numbers; prepare it again")
    return Index(np.dtype(DTYPES[code]), lengths, starts)


def _mapped(path: Path, dtype: type, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)
