"""Which files are read, and the documents in them: a .txt file is one, a line of a .jsonl file is one."""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from s3_megatron.errors import S3Error

READABLE = ".txt, .jsonl, and either of them with .gz or .zst"


class RawDocument(NamedTuple):
    """One document as it lies in its file.

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
        """What --strict says about it."""
        return S3Error(f"{self.where}: {self.reason}; mend it, or run without --strict to skip it")


def find_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, folders (searched in depth) and globs as a list of files, each once.

    The order is the one given, and by name within a folder or a glob, so that two runs write the same bytes.
    Raises S3Error for a name that leads to no file, or to a file of another kind.
    """
    found: list[Path] = []
    for name in map(str, inputs):
        path = Path(name)
        if path.is_dir():
            new = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        elif path.exists():
            new = [path]
        else:
            new = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
        if not new:
            raise S3Error(f"input {name}: no such file, and no files in it; readable are {READABLE}")
        found += new
    for path in found:
        if not _kind(path):
            raise S3Error(f"input {path}: unknown kind of file; readable are {READABLE}")
    # One file through two overlapping globs is a slip; its text twice in the data would go unseen.
    once: dict[Path, Path] = {}
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((kind for kind in (".txt", ".jsonl") if name.endswith(kind)), None)


def read_documents(paths: Iterable[Path]) -> Iterator[RawDocument]:
    """Every document of every file, in order, undecoded.

    Raises S3Error for a file that cannot be read to its end: a damaged archive is never skipped quietly.
    """
    read_before = 0
    for path in paths:
        is_json = _kind(path) == ".jsonl"
        try:
            with open(path, "rb") as file:
                stream = _decompressed(file)
                for line, data in enumerate(stream if is_json else [stream.read()], start=1):
                    yield RawDocument(str(path), line, data, is_json, read_before + file.tell())
                read_before += file.tell()
        except (OSError, EOFError, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            raise S3Error(f"input {path} cannot be read ({why}): mend it or leave it out") from error


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
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadDocument("broken JSON", where) from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise BadDocument(f'no text under key "{key}"', where)
    try:
        # JSON can spell half a surrogate pair ("\ud800"), which is no character and has no UTF-8.
        text.encode()
    except UnicodeEncodeError:
        raise BadDocument("invalid UTF-8", where) from None
    return text


def _decompressed(file: io.BufferedReader) -> io.BufferedIOBase:
    name = str(file.name).lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if name.endswith(".zst"):
        return io.BufferedReader(_Chunks(_zstd_chunks(file)))
    return file


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Decompressed pieces of every frame of a .zst file.

    Not zstandard's own stream_reader: it ends without a word where a file is cut off (zstandard 0.25).
    """
    try:
        import zstandard
    except ImportError:
        raise S3Error("reading .zst needs the package zstandard: pip install 's3-megatron[data]'") from None
    frame = None
    while chunk := file.read(1 << 16):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise OSError(error) from error
            chunk = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("it ends in the middle of a frame")


class _Chunks(io.RawIOBase):
    """A file over an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
