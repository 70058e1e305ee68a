"""A checkpoint whose files are damaged costs one start of a job: the next one tries the checkpoint before it."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s3_megatron.checkpoints.whole import LOAD_FAILED
from s3_megatron.engines.swap import SymbolSwap
from s3_megatron.errors import S3Error
from s3_megatron.files import write_file

# What torch, json and pickle raise of a file that is cut off or overwritten; a lost peer is an OSError, too.
_DAMAGE = (EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, json.JSONDecodeError)
_DAMAGE_IN_C = re.compile("PytorchStreamReader|unexpected EOF|wrong byte size|central directory")  # of RuntimeError


class LoadError(RuntimeError):
    """A checkpoint was not loaded, by no mistake of the configuration."""


@contextmanager
def watched(checkpoint: Callable[[], Path]) -> Iterator[None]:
    """Turn what the body, which loads ``checkpoint()``, raises into one line; in a job, mark what is damaged.

    ``s3_megatron.checkpoints.whole`` passes over a marked checkpoint until it is saved anew.

    Raises:
        S3Error: Megatron's assertions: the checkpoint is of another model.
        LoadError: anything else; torch's CheckpointException is no Exception, and had no line anywhere.
    """
    try:
        yield
    except (S3Error, SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except AssertionError as error:
        raise S3Error(f"{checkpoint()} does not fit this run: {' '.join(str(error).split())}") from error
    except BaseException as error:
        folder, cause = checkpoint(), _root(error)
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
        advice = ""
        if _is_damage(cause):
            advice = "; name an older one with --ckpt-step"
            if "S3_RUN_DIR" in os.environ:
                mark = folder / LOAD_FAILED
                write_file(mark, f"{reason}\n".encode())
                advice = f"; the next start tries the one before it, or this one again if {mark} is removed"
        raise LoadError(f"{folder} cannot be loaded: {reason}{advice}") from error


@contextmanager
def watches_megatron() -> Iterator[None]:
    """Watch the loading of checkpoints by ``megatron.training.training`` (0.19.2) while the body runs."""
    from megatron.training import get_args, training
    from megatron.training.checkpointing import get_checkpoint_tracker_filename

    def checkpoint() -> Path:
        args = get_args()
        folder = Path(args.load or args.pretrained_checkpoint)
        tracker = Path(get_checkpoint_tracker_filename(os.fspath(folder)))
        named = str(args.ckpt_step or (tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""))
        return folder / (f"iter_{int(named):07d}" if named.isdigit() else named)

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            with watched(checkpoint):
                return original(*args, **kwargs)

        return load_checkpoint

    swap = SymbolSwap("this megatron-core")
    swap.replace(training, "load_checkpoint", wrap)
    try:
        yield
    finally:
        swap.undo()


def _root(error: BaseException) -> BaseException:
    """Give the first rank's own exception of torch's CheckpointException (2.13), whose text is a page."""
    failures = getattr(error, "failures", None)
    return min(failures.items())[1][0] if failures else error


def _is_damage(cause: BaseException) -> bool:
    if isinstance(cause, ConnectionError):
        return False
    return isinstance(cause, _DAMAGE) or (isinstance(cause, RuntimeError) and bool(_DAMAGE_IN_C.search(str(cause))))
