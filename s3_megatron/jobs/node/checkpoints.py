"""Which checkpoints of a run are whole, read from their files' names and sizes, without torch."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.files import write_file

_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class _Format:
    """How an engine writes checkpoints: last of all the files in ``required``, then the pointer."""

    pointer: str
    required: tuple[str, ...]
    pieces: tuple[str, ...]

    def complete(self, checkpoint: Path) -> bool:
        """Whether every file is there and none is empty, as a full disk leaves them."""
        pieces = [path for pattern in self.pieces for path in checkpoint.glob(pattern)]
        return bool(pieces) and all(_has_content(path) for path in (*pieces, *map(checkpoint.joinpath, self.required)))


# megatron-core 0.19.2, --ckpt-format torch_dist: .metadata is written once every rank's .distcp is, then metadata.json.
# Older versions have a common.pt, too.
_MEGATRON = _Format("latest_checkpointed_iteration.txt", (".metadata", "metadata.json"), ("*.distcp", "*.pt"))
# s3_megatron.train.deepspeed_checkpoint: s3_megatron.json is written when every rank has written.
_DEEPSPEED = _Format("latest", ("s3_megatron.json",), ("*_states.pt",))


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _format(folder: Path) -> _Format:
    deepspeeds = (folder / _DEEPSPEED.pointer).exists() or any(folder.glob("iter_*/*_states.pt"))
    return _DEEPSPEED if deepspeeds else _MEGATRON


def _candidates(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield all checkpoints, the newest first; an iter_N_universal is a conversion, not one of the run's."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("iter_*") if path.is_dir())
    yield from sorted(((int(name[1]), path) for name, path in found if name), reverse=True)


def newest_complete(folder: Path) -> int | None:
    """Give the iteration of the newest whole checkpoint in ``folder``, Megatron's or DeepSpeed's."""
    found = newest(folder)
    return found[0] if found else None


def newest(folder: Path) -> tuple[int, float] | None:
    """Give the iteration of the newest whole checkpoint in ``folder``, and its age in seconds."""
    how = _format(folder)
    for iteration, path in _candidates(folder):
        if how.complete(path):
            return iteration, time.time() - (path / how.required[-1]).stat().st_mtime
    return None


def repair_pointer(folder: Path) -> str | None:
    """Let the file that names the checkpoint to resume from name a whole one; returns a line that says what changed.

    A pointer to a whole checkpoint stays, even if a newer one is there, and so does Megatron's "release". A single
    torn checkpoint that nothing has ever pointed to is what a kill in the first save leaves, and stays, too.

    Raises:
        S3Error: there are checkpoints, but none is whole, or what the pointer holds names none.
    """
    how, candidates = _format(folder), dict(_candidates(folder))
    pointer = folder / how.pointer
    named = pointer.read_text().strip() if pointer.is_file() else None
    if named == "release" or (named is None and not candidates):
        return None
    digits = re.fullmatch(r"(?:iter_)?(\d+)", named or "")
    if digits and int(digits[1]) in candidates and how.complete(candidates[int(digits[1])]):
        return None
    best = newest_complete(folder)
    state = "is missing" if named is None else f"names {named!r}, which is incomplete or not there"
    if best is None and named is None and len(candidates) == 1:
        return f"{next(iter(candidates.values()))} is not whole, as a kill in the first save leaves it: starting anew"
    if best is None:
        raise S3Error(
            f"{pointer} {state}, and no checkpoint in {folder} is whole ({len(candidates)} looked at): training would "
            "start from random weights; move the folder away if that is wanted, or bring a checkpoint back"
        )
    write_file(pointer, (str(best) if how is _MEGATRON else candidates[best].name).encode())
    return f"{pointer} {state}: it now names iteration {best}, the newest whole checkpoint"
