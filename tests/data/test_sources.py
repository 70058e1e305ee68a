"""Which files are read, what is in them, and what is wrong with them."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from s3_megatron.data.sources import BadDocument, RawDocument, find_inputs, read_documents, text_of
from s3_megatron.errors import S3Error


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def texts(path: Path) -> list[str]:
    return [text_of(document, "text") for document in read_documents([path])]


def test_inputs_keep_their_order_and_come_once(tmp_path: Path) -> None:
    """The first way of leaving out repeats kept a file's last place, not its first."""
    names = ["b.txt", "a.jsonl", "deep/c.JSONL.gz", "deep/d.txt.zst", "deep/notes.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_inputs([tmp_path / "deep", str(tmp_path / "*.txt"), tmp_path, str(tmp_path / "**" / "c*")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "deep/c.JSONL.gz",
        "deep/d.txt.zst",
        "b.txt",
        "a.jsonl",
    ]


@pytest.mark.parametrize("name", ["nothing.txt", "empty_folder", "*.jsonl", "notes.md", "model.txt.bz2"])
def test_an_input_that_gives_nothing_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "notes.md").touch()
    (tmp_path / "model.txt.bz2").touch()
    with pytest.raises(S3Error, match=r"\.jsonl") as error:
        find_inputs([tmp_path / name])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_compression_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zst}[suffix]
    lines = [json.dumps({"text": f"document {i} " + "x" * (i * 37 % 5000)}) + "\n" for i in range(300)]
    data = "".join(lines).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(data))
    documents = list(read_documents([path]))
    assert [document.data for document in documents] == [line.encode() for line in lines]
    assert [document.line for document in documents] == list(range(1, 301))
    assert documents[-1].read == path.stat().st_size
    whole = tmp_path / f"a.txt{suffix}"
    whole.write_bytes(pack(data))
    assert texts(whole) == [data.decode()]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_all_parts_of_a_concatenated_archive_are_read(tmp_path: Path, suffix: str) -> None:
    """`cat a.zst b.zst` is a valid archive; many readers stop silently after the first part."""
    pack = {".gz": gzip.compress, ".zst": zst}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "one"}\n{"text": "t') + pack(b'wo"}\n') + pack(b'{"text": "three"}\n'))
    assert texts(path) == ["one", "two", "three"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_or_damaged_archive_stops_the_run(tmp_path: Path, suffix: str) -> None:
    """zstandard's own stream_reader took a file cut off in the middle for a whole one (0.25)."""
    data = {".gz": gzip.compress, ".zst": zst}[suffix](b'{"text": "one"}\n' * 1000)
    path = tmp_path / f"a.jsonl{suffix}"
    for broken in (data[:-5], data[: len(data) // 2], b"no archive at all"):
        path.write_bytes(broken)
        with pytest.raises(S3Error, match=r"a\.jsonl.* cannot be read"):
            list(read_documents([path]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        (b'{"text": "half a pair \\ud83d"}', "invalid UTF-8"),
        (b'{"text": "cut of', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"title": "x"}', 'no text under key "text"'),
        (b'{"text": null}', 'no text under key "text"'),
        (b'["text"]', 'no text under key "text"'),
        (b'{"text": " \\n"}', "empty document"),
        (b"\r\n", "empty document"),
    ],
)
def test_a_bad_line_says_what_and_where(line: bytes, reason: str) -> None:
    with pytest.raises(BadDocument) as bad:
        text_of(RawDocument("data/a.jsonl", 7, line, True, 0), "text")
    assert (bad.value.reason, bad.value.where) == (reason, "data/a.jsonl:7")


def test_invalid_utf8_in_a_text_file_names_the_line_it_is_on() -> None:
    with pytest.raises(BadDocument) as bad:
        text_of(RawDocument("a.txt", 1, b"one\ntwo\nthr\xffee\n", False, 0), "text")
    assert bad.value.where == "a.txt:3"


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert texts(path) == ["one", "two"]
