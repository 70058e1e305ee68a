"""Megatron's indexed dataset, written so that PREFIX.idx exists only where PREFIX.bin is whole."""

import fcntl
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from s3_megatron.errors import S3Error
from s3_megatron.files import publish


def bin_and_idx(prefix: str | Path) -> tuple[Path, Path]:
    """The two files of a dataset, as ``--data-path PREFIX`` finds them."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def refuse_existing(prefix: str | Path) -> None:
    """Raise S3Error where the dataset is there: hours of work are not overwritten by a repeated command.

    A .bin without its .idx is what a run left that was ended between its two renames, or another program's.
    """
    if Path(prefix).name in ("", "..") or str(prefix).endswith("/"):
        raise S3Error(f"output {prefix} is a folder: give the files' name too, such as {Path(prefix) / 'text'}")
    data, index = bin_and_idx(prefix)
    if index.exists():
        raise S3Error(f"output {index} exists: choose another --output, or delete it and its .bin")
    if data.exists():
        raise S3Error(
            f"output {data} exists without its .idx, so it is no dataset: choose another --output, or delete it"
        )


@contextmanager
def new_dataset(prefix: str | Path, vocab_size: int) -> Iterator[Any]:
    """A ``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder`` (0.19.2) to add documents to.

    The dtype of the tokens is the one Megatron chooses for ``vocab_size``. The files get their names when the
    block ends well, .bin first; when it does not, nothing stays. Raises S3Error where they cannot be written,
    are there, or another process writes them now, and from ``add_document`` where an id does not fit the dtype.
    """
    with warnings.catch_warnings():
        # Megatron says six times that it found neither Transformer Engine nor Apex; neither writes a dataset.
        warnings.simplefilter("ignore")
        try:
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        except ImportError as error:
            raise S3Error(f"megatron-core is missing: pip install 's3-megatron[megatron]' ({error})") from error
    whole = bin_and_idx(prefix)
    partial = tuple(Path(f"{path}.partial") for path in whole)
    try:
        whole[0].parent.mkdir(parents=True, exist_ok=True)
        with open(partial[0], "ab") as lock:
            _lock(lock.fileno(), prefix)
            builder = IndexedDatasetBuilder(str(partial[0]), dtype=DType.optimal_dtype(vocab_size))
            builder.add_document = _checked(builder.add_document, np.iinfo(builder.dtype))
            try:
                refuse_existing(prefix)  # another run may have written them since this one began
                yield builder
                builder.finalize(str(partial[1]))
                publish(partial[0], whole[0])
                publish(partial[1], whole[1])
            finally:
                for path in partial:
                    path.unlink(missing_ok=True)
                builder.data_file.close()  # last: on a full disk its last write fails here once more
    except OSError as error:
        raise S3Error(f"output {prefix} cannot be written: {error.strerror or error}") from error


def _checked(add: Callable[..., None], limits: np.iinfo) -> Callable[..., None]:
    """``add`` behind a look at the ids: Megatron's builder silently makes 0 of 65,536 (0.19.2)."""

    def add_document(ids: np.ndarray, lengths: list[int]) -> None:
        ids = np.asarray(ids)
        if ids.size and not limits.min <= ids.min() <= ids.max() <= limits.max:
            wrong = ids[(ids < limits.min) | (ids > limits.max)][0]
            raise S3Error(
                f"token {wrong} does not fit {limits.dtype}, which the tokenizer's size asks for: the tokenizer makes "
                "tokens beyond the size that it names; mend its files, or use another"
            )
        add(ids, lengths)

    return add_document


def _lock(descriptor: int, prefix: str | Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise S3Error(f"output {prefix} is being written by another run: wait for it, or choose another") from None
