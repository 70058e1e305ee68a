"""What is in files, and what is wrong with them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from backports import zstd

from s3_megatron.data.sources import BadDocument, RawDocument, read_documents, text_of
from s3_megatron.errors import S3Error

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
PACKED = [suffix for suffix in PACK if suffix]


def texts(path: Path) -> list[str]:
    return [text_of(document, "text") for document in read_documents([path])]


@pytest.mark.parametrize("suffix", PACK)
def test_every_compression_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    pack = PACK[suffix]
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


@pytest.mark.parametrize("suffix", PACKED)
def test_all_parts_of_a_concatenated_archive_are_read(tmp_path: Path, suffix: str) -> None:
    """`cat a.zst b.zst` is a valid archive; many readers stop silently after the first part."""
    pack = PACK[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "one"}\n{"text": "t') + pack(b'wo"}\n') + pack(b'{"text": "three"}\n'))
    assert texts(path) == ["one", "two", "three"]


@pytest.mark.parametrize("suffix", PACKED)
def test_a_cut_off_or_damaged_archive_stops_the_run(tmp_path: Path, suffix: str) -> None:
    """zstandard's own stream_reader took a file cut off in the middle for a whole one (0.25)."""
    data = PACK[suffix](b'{"text": "one"}\n' * 1000)
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
        (b'{"text": "two"}{"text": "documents"}', "something behind the JSON on its line"),
        (b'{"text": ["one sentence.", "another"]}', 'no text under key "text"'),
        (b'{"text": 9}', 'no text under key "text"'),
        (b'{"a": {"text": "nested"}}', 'no text under key "text"'),
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


@pytest.mark.parametrize("suffix", PACKED)
def test_what_follows_an_archive_is_never_left_out(tmp_path: Path, suffix: str) -> None:
    """bz2 and lzma take a later stream that is damaged at its start for padding: half a file went missing unseen."""
    pack = PACK[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    one, two = pack(b'{"text": "one"}\n'), pack(b'{"text": "two"}\n')
    for behind in (b"trailing garbage", b"x" + two[1:], two[:-1]):
        path.write_bytes(one + behind)
        with pytest.raises(S3Error, match=r"a\.jsonl.* cannot be read") as error:
            list(read_documents([path]))
        assert "\n" not in str(error.value)


def test_null_bytes_between_streams_are_padding(tmp_path: Path) -> None:
    """The xz format has it, and tapes leave it."""
    for suffix in (".gz", ".bz2", ".xz"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(PACK[suffix](b'{"text": "one"}\n') + bytes(8) + PACK[suffix](b'{"text": "two"}\n') + bytes(4))
        assert texts(path) == ["one", "two"]


def test_a_number_of_any_length_beside_the_text_is_no_error(tmp_path: Path) -> None:
    """Python makes no int of more than 4,300 digits, and the document was lost as broken JSON."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "n": ' + "9" * 5000 + '}\n{"text": "two", "n": NaN}\n')
    assert texts(path) == ["one", "two"]


def test_a_key_with_a_dot_is_a_key() -> None:
    assert text_of(RawDocument("a.jsonl", 1, b'{"a.b": "dotted"}', True, 0), "a.b") == "dotted"
