"""`data inspect` against Megatron's own reader, and against damage."""

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
