"""`data inspect` against Megatron's own reader, and against damage."""

import struct
from pathlib import Path

import numpy as np
import pytest

from s3_megatron.data import inspect, prepare, writer
from s3_megatron.errors import S3Error


@pytest.fixture
def prefix(corpus: Path, model: Path, tmp_path: Path) -> Path:
    prepare([corpus / "json_*.txt"], tmp_path / "a", tokenizer_model=model, append_eod=True, workers=1)
    return tmp_path / "a"


def test_numbers_are_megatrons(prefix: Path, corpus: Path, model: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    # A copy: the dataset's end closes the mapping under its arrays.
    lengths = dataset.sequence_lengths.copy()
    report = inspect(prefix, tokenizer_model=model)
    assert (report.documents, report.tokens, report.dtype) == (len(lengths), lengths.sum(), "uint16")
    assert (report.shortest, report.median, report.longest) == (
        lengths.min(),
        np.median(lengths),
        lengths.max(),
    )
    assert len(report.sample_ids) == 100
    assert report.sample_text
    assert sorted(corpus.glob("json_*"))[0].read_text().startswith(report.sample_text)
    assert inspect(prefix).sample_text is None


def test_a_document_of_several_sequences_counts_once(tmp_path: Path) -> None:
    """Megatron's own tool writes a sequence a sentence with --split-sentences."""
    with writer.new_dataset(tmp_path / "a", 100) as builder:
        builder.add_document([5, 6, 7, 8, 9], [2, 3])
        builder.add_document([4], [1])
    report = inspect(tmp_path / "a")
    assert (report.documents, report.tokens, report.shortest, report.longest) == (2, 6, 1, 5)
    assert report.sample_ids == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".idx", None, r"a\.idx is missing"),
        (".bin", None, r"a\.bin is missing"),
        (".bin", lambda data: data[:-7], r"a\.bin has \d+ bytes where its \.idx promises \d+"),
        (".bin", lambda data: data + b"xx", "belongs to another"),
        (".idx", lambda data: data[:-7], r"a\.idx is cut off"),
        (".idx", lambda data: data[:20], r"no index of Megatron's, or is cut off"),
        (".idx", lambda data: b"x" + data[1:], "no index of Megatron's"),
        (".idx", lambda data: data[:9] + b"\x02" + data[10:], "version 2"),
    ],
)
def test_a_damaged_dataset_is_one_line(prefix: Path, suffix: str, damage: object, message: str) -> None:
    path = Path(f"{prefix}{suffix}")
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(S3Error, match=message) as error:
        inspect(prefix)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_size_is_named(tmp_path: Path, model: Path) -> None:
    with writer.new_dataset(tmp_path / "a", 40_000) as builder:
        builder.add_document([3999], [1])
    with pytest.raises(S3Error, match=r"token 3999 .* only 1000: it was written with another tokenizer"):
        inspect(tmp_path / "a", tokenizer_model=model)


def test_a_first_document_without_tokens_is_no_traceback(tmp_path: Path, model: Path) -> None:
    """Megatron reads such a file, and inspect took the largest of no ids."""
    with writer.new_dataset(tmp_path / "a", 100) as builder:
        builder.add_document([], [0])
        builder.add_document([5, 6], [2])
    report = inspect(tmp_path / "a", tokenizer_model=model)
    assert (report.documents, report.shortest, report.sample_ids) == (2, 0, [5, 6])
    with writer.new_dataset(tmp_path / "b", 100) as builder:
        builder.add_document([], [0])
    with pytest.raises(S3Error, match="holds no token in 1 documents"):
        inspect(tmp_path / "b")


@pytest.mark.parametrize("name", ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"])
def test_every_dtype_of_megatrons_is_read(tmp_path: Path, model: Path, name: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=getattr(np, name), multimodal=True)
    builder.add_document(np.array([1, 2, 120]), [3], [0])
    builder.finalize(f"{tmp_path}/a.idx")
    assert inspect(tmp_path / "a").sample_ids == [1, 2, 120]
    if name.startswith("float"):
        with pytest.raises(S3Error, match=f"holds {name}, which no tokenizer decodes"):
            inspect(tmp_path / "a", tokenizer_model=model)
    else:
        assert inspect(tmp_path / "a", tokenizer_model=model).sample_text is not None


def test_what_is_no_dataset_is_one_line(tmp_path: Path, prefix: Path) -> None:
    good = Path(f"{prefix}.idx").read_bytes()
    count = struct.unpack_from("<Q", good, 18)[0]
    ends = len(good) - 8
    for content, message in [
        (b"", "no index of Megatron's, or is cut off"),
        (b"TNTIDX\x00\x00" + bytes(50), "format of 2019"),
        (good[:34] + struct.pack("<i", -5) + good[38:], "damaged"),
        (good[:ends] + struct.pack("<q", count + 1), "damaged"),
        (good[:18] + struct.pack("<Q", 1 << 62) + good[26:], "cut off"),
    ]:
        Path(f"{prefix}.idx").write_bytes(content)
        with pytest.raises(S3Error, match=message) as error:
            inspect(prefix)
        assert "\n" not in str(error.value)
    Path(f"{prefix}.idx").unlink()
    Path(f"{prefix}.idx").mkdir()
    with pytest.raises(S3Error, match=r"a\.idx is no file"):
        inspect(prefix)
    with pytest.raises(S3Error, match="cannot be read: File name too long"):
        inspect(tmp_path / ("x" * 300))


def test_a_negative_token_is_no_traceback(tmp_path: Path, model: Path) -> None:
    with writer.new_dataset(tmp_path / "a", 70_000) as builder:
        builder.add_document([-1], [1])
    with pytest.raises(S3Error, match="token -1 "):
        inspect(tmp_path / "a", tokenizer_model=model)
