"""The way from text files to a dataset Megatron trains on."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from s3_megatron import machine
from s3_megatron.data.encoding import Encoder, EncoderSettings, encode_documents
from s3_megatron.data.inputs import Inputs, find_inputs
from s3_megatron.data.sources import BadDocument, read_documents, shown
from s3_megatron.data.tokenizer_training import train_sentencepiece
from s3_megatron.data.writer import new_dataset, refuse_existing
from s3_megatron.errors import S3Error

# How many skipped documents of each reason a report names.
NAMED = 5


@dataclass(frozen=True)
class Progress:
    """How far a run is: good documents and the bytes of their text so far, bytes of input read and in all."""

    documents: int
    text_bytes: int
    read: int
    total: int


@dataclass
class PrepareReport:
    """What was written and what was not; ``text_bytes`` counts UTF-8, ``skipped`` documents by reason.

    ``files`` counts the documents written from each file that was read, as ``sources.shown`` shows its path.
    """

    prefix: Path
    vocab_size: int
    megatron_flags: list[str]
    tokenizer_model: Path | None = None
    dtype: str = ""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    files: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_where: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, bad: BadDocument) -> None:
        """Count a document left out, and keep the first few places."""
        self.skipped[bad.reason] += 1
        places = self.skipped_where.setdefault(bad.reason, [])
        if len(places) < NAMED:
            places.append(bad.where)


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "sentencepiece",
    tokenizer_model: str | Path | None = None,
    train_vocab_size: int | None = None,
    json_key: str = "text",
    append_eod: bool = False,
    workers: int | None = None,
    strict: bool = False,
    on_inputs: Callable[[Inputs], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Write ``output``.bin and ``output``.idx from the documents of ``inputs``.

    ``tokenizer`` is "sentencepiece", "gpt2" or "hf:NAME"; with ``train_vocab_size`` a SentencePiece model is
    trained on the inputs first and written to ``tokenizer_model``, or ``output``.model. The number of
    ``workers`` (processes, one a core) never changes the bytes; a script that calls this with more than one
    needs ``if __name__ == "__main__"``. Documents with invalid UTF-8, broken JSON, no string under
    ``json_key``, no text or no tokens are skipped and counted; under ``strict`` the first raises. ``on_inputs``
    gets the files before any is read. Raises S3Error; then no dataset is there.
    """
    started = time.monotonic()
    refuse_existing(output)
    workers = machine.cores() if workers is None else workers
    if workers < 1:
        raise S3Error(f"--workers {workers}: at least 1")
    found = find_inputs(inputs)
    if on_inputs:
        on_inputs(found)
    paths = found.taken
    if train_vocab_size is not None:
        if tokenizer != "sentencepiece":
            raise S3Error(f"--train-tokenizer trains a SentencePiece model: leave out --tokenizer {tokenizer}")
        model = tokenizer_model or f"{output}.model"
        tokenizer_model = train_sentencepiece(paths, model, train_vocab_size, json_key=json_key, strict=strict)
    settings = EncoderSettings(tokenizer, tokenizer_model, json_key, append_eod)
    loaded = Encoder(settings).tokenizer
    flags = [*loaded.megatron_flags, "--vocab-size", str(loaded.vocab_size), "--data-path", str(output)]
    report = PrepareReport(Path(output), loaded.vocab_size, flags)
    report.tokenizer_model = None if tokenizer_model is None else Path(tokenizer_model)
    _write(report, paths, settings, workers, strict, on_progress)
    report.seconds = time.monotonic() - started
    return report


def _write(
    report: PrepareReport,
    paths: list[Path],
    settings: EncoderSettings,
    workers: int,
    strict: bool,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    total = sum(path.stat().st_size for path in paths)
    report.files.update(dict.fromkeys(map(shown, paths), 0))
    batches = encode_documents(read_documents(paths), settings, workers)
    with new_dataset(report.prefix, report.vocab_size) as builder, closing(batches):
        report.dtype = builder.dtype.__name__
        for batch in batches:
            for bad in batch.bad:
                if strict:
                    raise bad.refusal()
                report.skip(bad)
            start = 0
            for length in batch.lengths:
                builder.add_document(batch.tokens[start : start + length], [length])
                start += length
            report.documents += len(batch.lengths)
            report.files.update(batch.files)
            report.tokens += start
            report.text_bytes += batch.text_bytes
            if on_progress:
                on_progress(Progress(report.documents, report.text_bytes, batch.read, total))
        if not report.documents:
            raise S3Error(f"the input has no usable document ({_counts(report)}): check the files and --json-key")


def _counts(report: PrepareReport) -> str:
    named = [
        f"{count} with {reason}, first {report.skipped_where[reason][0]}" for reason, count in report.skipped.items()
    ]
    return "; ".join(named) or "no line in any file"
