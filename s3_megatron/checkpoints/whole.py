"""Which checkpoints of a run are whole: their files' names and sizes against what was written down when they were."""

import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.checkpoints.metadata import stored_files
from s3_megatron.errors import S3Error
from s3_megatron.files import write_file

_NAME = re.compile(r"iter_(\d{7,})")
# Written into a checkpoint that an entry could not load (s3_megatron.train.loading); its text says why.
LOAD_FAILED = "load_failed"
ABOUT_DEEPSPEED = "s3_megatron.json"
# Each engine's file that names the checkpoint to resume from.
MEGATRON_POINTER, DEEPSPEED_POINTER = "latest_checkpointed_iteration.txt", "latest"


@dataclass(frozen=True)
class _Format:
    """How an engine writes checkpoints: last of all the files in ``required``, then the pointer."""

    pointer: str
    required: tuple[str, ...]
    pieces: tuple[str, ...]
    sizes: Callable[[Path], dict[str, int]]  # what the checkpoint itself says that its files hold, at the least

    def defect(self, checkpoint: Path) -> str | None:
        """Say what keeps ``checkpoint`` from being whole; None if nothing does."""
        try:
            return next(self._defects(checkpoint), None)
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"
        except ValueError as error:
            return str(error)

    def _defects(self, checkpoint: Path) -> Iterator[str]:
        for name in self.required:
            if not _size(checkpoint / name):
                yield f"{name} is missing or empty"
        pieces = [path for pattern in self.pieces for path in sorted(checkpoint.glob(pattern))]
        if not pieces:
            yield f"it has no {' or '.join(self.pieces)}"
        for path in pieces:
            if not _size(path):
                yield f"{path.name} is empty"
            if path.suffix == ".pt" and not zipfile.is_zipfile(path):  # its table of contents is its end
                yield f"{path.name} is cut off"
        for name, size in self.sizes(checkpoint).items():
            if (found := _size(checkpoint / name)) < size:
                yield f"{name} is missing" if not found else f"{name} has {found:,} of {size:,} bytes"
        failed, last = checkpoint / LOAD_FAILED, checkpoint / self.required[-1]
        if failed.exists() and failed.stat().st_mtime >= last.stat().st_mtime:  # or it was saved anew since
            yield f"it could not be loaded ({failed.read_text(encoding='utf-8').strip()})"


def _deepspeed_sizes(checkpoint: Path) -> dict[str, int]:
    try:
        about = json.loads((checkpoint / ABOUT_DEEPSPEED).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{ABOUT_DEEPSPEED} is torn: {error}") from error
    return about.get("files", {})  # not there before 2026-11


# megatron-core 0.19.2, --ckpt-format torch_dist: .metadata is written once every rank's .distcp is, then metadata.json.
# Older versions have a common.pt, too.
_MEGATRON = _Format(
    MEGATRON_POINTER,
    (".metadata", "metadata.json"),
    ("*.distcp", "*.pt"),
    lambda checkpoint: stored_files(checkpoint / ".metadata"),
)
# s3_megatron.train.deepspeed_checkpoint: s3_megatron.json is written when every rank has written.
_DEEPSPEED = _Format(DEEPSPEED_POINTER, (ABOUT_DEEPSPEED,), ("*_states.pt",), _deepspeed_sizes)


def _size(path: Path) -> int:
    """Give the bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _format(folder: Path) -> _Format:
    deepspeeds = (folder / _DEEPSPEED.pointer).exists() or any(folder.glob("iter_*/*_states.pt"))
    return _DEEPSPEED if deepspeeds else _MEGATRON


def _candidates(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield all checkpoints, the newest first; an iter_N_universal is a conversion, not one of the run's."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("iter_*") if path.is_dir())
    yield from sorted(((int(name[1]), path) for name, path in found if name), reverse=True)


@dataclass(frozen=True)
class Newest:
    """The newest whole checkpoint of a run, and why newer ones are none."""

    iteration: int | None
    age: float  # seconds
    torn: tuple[tuple[int, str], ...]  # newer iterations, and what is wrong with each

    @property
    def torn_text(self) -> str:
        """Name the newer checkpoints; "" without any."""
        return "; ".join(f"iteration {iteration:,} is not whole: {why}" for iteration, why in self.torn)


def newest(folder: Path) -> Newest:
    """Look for the newest whole checkpoint in ``folder``, Megatron's or DeepSpeed's."""
    how, torn = _format(folder), list[tuple[int, str]]()
    for iteration, path in _candidates(folder):
        if (why := how.defect(path)) is None:
            return Newest(iteration, time.time() - (path / how.required[-1]).stat().st_mtime, tuple(torn))
        torn.append((iteration, why))
    return Newest(None, 0.0, tuple(torn))


def repair_pointer(folder: Path) -> str | None:
    """Let the file that names the checkpoint to resume from name a whole one; returns a line that says what changed.

    A pointer to a whole checkpoint stays, even if a newer one is there, and so does Megatron's "release". A single
    torn checkpoint that nothing has ever pointed to is what a kill in the first save leaves, and stays, too.

    Raises:
        S3Error: there are checkpoints, but none is whole, or what the pointer holds names none.
    """
    how, candidates = _format(folder), dict(_candidates(folder))
    pointer = folder / how.pointer
    named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
    if named == "release" or (named is None and not candidates):
        return None
    digits = re.fullmatch(r"(?:iter_)?(\d+)", named or "")
    why: str | None = "there is none"
    if digits and int(digits[1]) in candidates and (why := how.defect(candidates[int(digits[1])])) is None:
        return None
    found = newest(folder)
    state = "is missing" if named is None else f"names {named!r}, which is not whole ({why})"
    if found.iteration is None and named is None and len(candidates) == 1:
        return f"{next(iter(candidates.values()))} is not whole, as a kill in the first save leaves it: starting anew"
    if found.iteration is None:
        raise S3Error(
            f"{pointer} {state}, and no checkpoint in {folder} is whole ({found.torn_text or 'there is none'}): "
            "training would start from random weights; move the folder away if that is wanted, or bring a checkpoint "
            "back"
        )
    write_file(pointer, (str(found.iteration) if how is _MEGATRON else candidates[found.iteration].name).encode())
    return f"{pointer} {state}: it now names iteration {found.iteration}, the newest whole checkpoint"
