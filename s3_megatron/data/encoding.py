"""Documents to ids in several processes, in the order of the input whatever their number."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from s3_megatron.data.sources import BadDocument, RawDocument, text_of
from s3_megatron.data.tokenizers import load_tokenizer
from s3_megatron.errors import S3Error

# About half a second of work for SentencePiece: small enough to share out, large enough to be worth sending.
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
# Batches on their way for each process: keeps all busy, bounds the memory.
AHEAD = 4


@dataclass(frozen=True)
class EncoderSettings:
    """What a process needs to encode: it loads the tokenizer for itself."""

    tokenizer: str
    tokenizer_model: str | Path | None
    json_key: str
    append_eod: bool


@dataclass
class Encoded:
    """The ids (int32) of a batch's good documents end to end, their lengths, how many each file has, the bad ones."""

    read: int
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    lengths: list[int] = field(default_factory=list)
    files: Counter[str] = field(default_factory=Counter)
    bad: list[BadDocument] = field(default_factory=list)
    text_bytes: int = 0


class Encoder:
    """Turns batches of raw documents into ids."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_model)
        self._end: list[int] = []
        if settings.append_eod:
            if self.tokenizer.eod is None:
                raise S3Error(
                    f"--append-eod: tokenizer {settings.tokenizer_model or settings.tokenizer} has no "
                    "end-of-sequence token; leave --append-eod out, or choose a tokenizer that has one"
                )
            self._end = [self.tokenizer.eod]

    def __call__(self, batch: list[RawDocument]) -> Encoded:
        """Encode one batch (not empty)."""
        tokens: list[int] = []
        done = Encoded(batch[-1].read)
        for document in batch:
            try:
                text = text_of(document, self.settings.json_key)
                ids = self._ids(text, document)
            except BadDocument as bad:
                done.bad.append(bad)
                continue
            tokens += ids
            done.lengths.append(len(ids))
            done.files[document.path] += 1
            done.text_bytes += len(text.encode())
        done.tokens = np.array(tokens, np.int32)
        return done

    def _ids(self, text: str, document: RawDocument) -> list[int]:
        ids = self.tokenizer.encode(text)
        where = f"{document.path}:{document.line}"
        if not ids:  # a zero-width space, which many models' normalisation takes away, is text to Python
            raise BadDocument("no tokens", where)
        if min(ids) < 0 or max(ids) >= self.tokenizer.vocab_size:
            wrong = next(one for one in ids if not 0 <= one < self.tokenizer.vocab_size)
            raise S3Error(
                f"{where}: tokenizer {self.settings.tokenizer_model or self.settings.tokenizer} makes token {wrong} of "
                f"it, and says that it has {self.tokenizer.vocab_size}: Megatron's embedding would not hold it; mend "
                "the tokenizer's files, or use another"
            )
        return ids + self._end


def encode_documents(documents: Iterable[RawDocument], settings: EncoderSettings, workers: int) -> Generator[Encoded]:
    """Encode every document, in order, in ``workers`` processes; close() the iterator to stop them.

    Raises S3Error where a process dies.
    """
    batches = _batches(documents)
    if workers == 1:
        yield from map(Encoder(settings), batches)
        return
    # spawn: the caller may hold torch's threads, and a fork of those hangs.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (settings,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise S3Error(
            f"one of {workers} worker processes died, out of memory perhaps: try a smaller --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encoder: Encoder


def _start(settings: EncoderSettings) -> None:
    global _encoder
    # Ctrl-C reaches the whole process group; the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(settings)


def _end_with_parent() -> None:
    # A killed parent closes nothing: its workers would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: list[RawDocument]) -> Encoded:
    return _encoder(batch)
