"""The documents in a file, undecoded, and the text in a document."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Buffer, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from s3_megatron.errors import S3Error

KINDS = (".txt", ".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 16  # bytes


class RawDocument(NamedTuple):
    """One document as it lies in its file, whose ``path`` is as ``shown`` shows it.

    ``line`` is where it starts (from 1), ``read`` how many bytes of all input files had been read by its end:
    compressed bytes where the file is compressed.
    """

    path: str
    line: int
    data: bytes
    is_json: bool
    read: int


class BadDocument(Exception):
    """A document that cannot be used; ``reason`` is one of a few, ``where`` is file:line."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(reason, where)
        self.reason, self.where = reason, where

    def refusal(self) -> S3Error:
        """What --strict prints about it."""
        return S3Error(f"{self.where}: {self.reason}; mend it, or run without --strict to skip it")


def shown(path: str | Path) -> str:
    """A path as text that any terminal takes: bytes that are no UTF-8 and control characters are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(path))


def uncompressed(name: str) -> str:
    """A file's name in small letters, without the ending of its compression."""
    name = name.lower()
    return name.removesuffix(next(filter(name.endswith, COMPRESSIONS), ""))


def kind_of(path: Path) -> str | None:
    """The ending, one of KINDS, that says what is in a file."""
    return next(filter(uncompressed(path.name).endswith, KINDS), None)


def read_documents(paths: Iterable[Path]) -> Iterator[RawDocument]:
    """Every document of every file, in order, undecoded: a .txt file is one, in the other kinds a line is.

    Raises S3Error for a file that cannot be read to its end: a damaged archive is never skipped quietly.
    """
    read_before = 0
    for path in paths:
        is_json, line = kind_of(path) != ".txt", 0
        try:
            with open(path, "rb") as file:
                stream = _decompressed(file)
                for line, data in enumerate(stream if is_json else [stream.read()], start=1):
                    yield RawDocument(shown(path), line, data, is_json, read_before + file.tell())
                read_before += file.tell()
        except _damages() as error:
            raise _unreadable(path, error, f" beyond line {line}" if line else "") from error


def first_record(path: Path) -> object:
    """The JSON value on the first line of ``path`` that is not blank; None where there is none, or no JSON."""
    try:
        with open(path, "rb") as file:
            lines = iter(_decompressed(file))
            return _parsed(next(filter(bytes.strip, lines), b"").decode("utf-8-sig"))
    except S3Error:
        raise
    except (ValueError, RecursionError):
        return None
    except _damages() as error:
        raise _unreadable(path, error, "") from error


def text_of(document: RawDocument, json_key: str) -> str:
    """The text of a document; raises BadDocument for anything that has none."""
    where = f"{document.path}:{document.line}"
    try:
        # -sig: a byte-order mark is no part of the text, and json refuses it.
        text = document.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = document.line + document.data.count(b"\n", 0, error.start)
        raise BadDocument("invalid UTF-8", f"{document.path}:{line}") from None
    if document.is_json and text.strip():
        text = _json_text(text, json_key, where)
    if not text.strip():
        raise BadDocument("empty document", where)
    return text


def _json_text(line: str, key: str, where: str) -> str:
    try:
        record = _parsed(line)
    except json.JSONDecodeError as error:
        more = error.msg == "Extra data"
        raise BadDocument("something behind the JSON on its line" if more else "broken JSON", where) from None
    except (ValueError, RecursionError):
        raise BadDocument("broken JSON", where) from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise BadDocument(f'no text under key "{key}"', where)
    try:
        # JSON can spell half a surrogate pair ("\\ud800"), which is no character and has no UTF-8.
        text.encode()
    except UnicodeEncodeError:
        raise BadDocument("invalid UTF-8", where) from None
    return text


def _parsed(line: str) -> object:
    # float: Python makes no int of more than 4,300 digits, and no number is used.
    return json.loads(line, parse_int=float)


def _unreadable(path: Path, error: Exception, where: str) -> S3Error:
    why = getattr(error, "strerror", None) or error
    return S3Error(f"input {shown(path)} cannot be read{where} ({why}): mend it or leave it out")


def _damages() -> tuple[type[Exception], ...]:
    """What the readers raise of a file that is damaged or cut off."""
    damages: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    zstd = _zstd()
    return damages if zstd is None else (*damages, zstd.ZstdError)


def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            return None
    return zstd


def _decompressed(file: io.BufferedReader) -> io.BufferedIOBase:
    name = str(file.name).lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if name.endswith(".bz2"):
        return io.BufferedReader(_Streams(file, bz2.BZ2Decompressor))
    if name.endswith(".xz"):
        return io.BufferedReader(_Streams(file, lzma.LZMADecompressor))
    if name.endswith(".zst"):
        if (zstd := _zstd()) is None:
            raise S3Error("reading .zst needs the package backports.zstd: pip install 's3-megatron[data]'")
        return cast(io.BufferedIOBase, zstd.ZstdFile(file))
    return file


class _Streams(io.RawIOBase):
    """Every compressed stream of a file, one after the other.

    bz2.open and lzma.open take what is damaged at the start of a later stream for padding, and the rest of the file
    is left out in silence (Python 3.12 and 3.13).
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self._file, self._new, self._decompressor = file, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view, out = memoryview(buffer), b""
        while not out:
            if self._decompressor.eof:
                # Null bytes between streams are padding.
                data = self._decompressor.unused_data.lstrip(b"\0")
                while not data:
                    if not (data := self._file.read(_CHUNK)):
                        return 0
                    data = data.lstrip(b"\0")
                self._decompressor = self._new()
            elif not self._decompressor.needs_input:
                data = b""
            elif not (data := self._file.read(_CHUNK)):
                raise EOFError("it ends in the middle of a compressed stream")
            out = self._decompressor.decompress(data, len(view))
        view[: len(out)] = out
        return len(out)
