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
from s3_megatron.errors import S3Error
from s3_megatron.files import write_file
from s3_megatron.run_folder import of_this_job
from s3_megatron.swap import SymbolSwap

# What torch, json and pickle raise of a file that is cut off or overwritten; a lost peer is an OSError, too.
_DAMAGE = (EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, json.JSONDecodeError)
_DAMAGE_IN_C = re.compile("PytorchStreamReader|unexpected EOF|wrong byte size|central directory")  # of RuntimeError

# What megatron-core 0.19.2 says in a RuntimeError of a checkpoint that was saved under other flags.
_OTHER_FLAGS = re.compile(r"mismatch|Expected \d+ entries|Detected load from|Error\(s\) in loading state_dict")
_STATE = re.compile("[oO]ptimizer|entries|flattened_range")  # in it, or in the names of flags: of the optimizer's state
_LAYOUT = re.compile(r"\(TP, PP\)|bucket_idx")

# What OptimizerParamScheduler (megatron-core 0.19.2) compares with the checkpoint's, by the flags that say it.
_SCHEDULE = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_decay_style": "--lr-decay-style",
    "lr_decay_steps": "--lr-decay-iters (else --train-iters) in samples",
    "lr_warmup_steps": "--lr-warmup-iters in samples",
    "start_wd": "--start-weight-decay (else --weight-decay)",
    "end_wd": "--end-weight-decay (else --weight-decay)",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "--train-iters in samples",
}


class LoadError(RuntimeError):
    """A checkpoint was not loaded, by no mistake of the configuration."""


@contextmanager
def watched(checkpoint: Callable[[], Path], changed: Callable[[], list[str]] = list) -> Iterator[None]:
    """Turn what the body, which loads ``checkpoint()``, raises into one line; in a job, mark what is damaged.

    ``changed()`` are the flags that are others than in the checkpoint's run and bind its tensors.
    ``s3_megatron.checkpoints.whole`` passes over a marked checkpoint until it is saved anew.

    Raises:
        S3Error: Megatron's assertions, and what other flags explain: the checkpoint is of another model, layout or
            precision, or its state is another optimizer's.
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
        if misfit := _misfit(cause, changed):
            raise S3Error(f"{folder} {misfit}") from error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
        advice = ""
        if _is_damage(cause):
            advice = "; name an older one with --ckpt-step"
            if of_this_job() is not None:
                mark = folder / LOAD_FAILED
                advice = f"; the next start tries the one before it, or this one again if {mark} is removed"
                try:
                    write_file(mark, f"{reason}\n".encode())
                except S3Error as unwritten:
                    advice = f"; the next start tries it again, for {unwritten}: move {folder.name} away"
        raise LoadError(f"{folder} cannot be loaded: {reason}{advice}") from error


def _misfit(cause: BaseException, changed: Callable[[], list[str]]) -> str | None:
    """Say which of the ``changed`` flags, or which other optimizer, may have made ``cause``; None for other causes."""
    text = " ".join(str(cause.args[0] if isinstance(cause, KeyError) and cause.args else cause).split())
    if not (
        isinstance(cause, KeyError)
        or type(cause).__name__ == "CheckpointingException"  # megatron-core's; any reason but damage
        or (isinstance(cause, RuntimeError) and _OTHER_FLAGS.search(text))
    ):
        return None
    if "Detected load from a distributed checkpoint" in text:
        return "is in another format than --ckpt-format says: pass --ckpt-format torch_dist"
    missing = text.partition(" from model not in state dict")[0] if isinstance(cause, KeyError) else None
    if missing is not None:
        text = f"{missing} is not in it"
    flags = "; ".join(changed())
    is_state = bool(_STATE.search(text + flags))
    fresh = ", or pass --no-load-optim to go on from its weights with fresh state" if is_state else ""
    if flags:
        reshape = ""
        if _LAYOUT.search(text) and not _STATE.search(flags):
            reshape = ", save it again with --dist-ckpt-optim-fully-reshardable, which other layouts can load"
        text = text.partition(" Please use")[0].rstrip(".")[:300]  # Megatron's advice is of another format
        return f"does not fit this run, whose flags are others ({flags}): {text}: give its values{reshape}{fresh}"
    if missing is not None and "optimizer." in missing:
        return (
            f"holds no {missing}: another optimizer wrote its state; give --optimizer, and with softmuon "
            f"--softmuon-scalar-optimizer, as that run had them{fresh}"
        )
    return None


@contextmanager
def watches_megatron() -> Iterator[None]:
    """Watch the loading of checkpoints by ``megatron.training.training`` (0.19.2) while the body runs."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import checkpointing, get_args, training
    from megatron.training.checkpointing import get_checkpoint_tracker_filename

    from s3_megatron.train import changes

    def checkpoint() -> Path:
        args = get_args()
        folder = Path(args.load or args.pretrained_checkpoint)
        tracker = Path(get_checkpoint_tracker_filename(os.fspath(folder)))
        named = str(args.ckpt_step or (tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""))
        return folder / (f"iter_{int(named):07d}" if named.isdigit() else named)

    saved: dict[str, Any] = {}  # settings of the checkpoint's run, known once its common part is read

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            with watched(checkpoint, lambda: changes.that_bind(saved)), _without_optimizer(checkpoint):
                iteration, operations = original(*args, **kwargs)
            changes.announce_end(iteration, get_args().load)
            return iteration, operations

        return load_checkpoint

    def remembers(original: Callable[..., Any]) -> Callable[..., Any]:
        def _load_base_checkpoint(*args: Any, **kwargs: Any) -> Any:
            loaded = original(*args, **kwargs)
            if loaded[0] is not None and "args" in loaded[0]:
                saved.update(changes.settings(loaded[0]["args"]))
            return loaded

        return _load_base_checkpoint

    swap = SymbolSwap("this megatron-core")
    swap.replace(checkpointing, "_load_base_checkpoint", remembers)
    swap.replace(training, "load_checkpoint", wrap)
    swap.replace(OptimizerParamScheduler, "load_state_dict", _compares_schedules)
    swap.replace(checkpointing, "check_checkpoint_args", changes.watches_arguments)
    try:
        yield
    finally:
        swap.undo()


@contextmanager
def _without_optimizer(checkpoint: Callable[[], Path]) -> Iterator[None]:
    """Say what a checkpoint of weights alone can be used for; Megatron looks for the rest of it (KeyError)."""
    try:
        yield
    except KeyError as error:
        if error.args not in (("optimizer",), ("opt_param_scheduler",)):
            raise
        raise S3Error(
            f"{checkpoint()} holds no optimizer state, as --no-save-optim saves it: pass --no-load-optim to go on from "
            "its weights with fresh state and the schedule from its beginning"
        ) from error


def _compares_schedules(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``OptimizerParamScheduler.load_state_dict``, which asserts, on its first difference alone."""

    def load_state_dict(scheduler: Any, state_dict: dict[str, Any]) -> None:
        if not (scheduler.override_opt_param_scheduler or scheduler.use_checkpoint_opt_param_scheduler):
            ours = scheduler.state_dict()
            changes = [
                f"{flag} {state_dict[key]}, here {ours[key]}"
                for key, flag in _SCHEDULE.items()
                if key in state_dict and state_dict[key] != ours[key]
            ]
            if changes:
                raise S3Error(
                    f"the checkpoint was trained with another schedule ({'; '.join(changes)}): pass "
                    "--override-opt-param-scheduler to go on with this run's, or "
                    "--use-checkpoint-opt-param-scheduler with the checkpoint's"
                )
        original(scheduler, state_dict)

    return load_state_dict


def _root(error: BaseException) -> BaseException:
    """Give the first rank's own exception of torch's CheckpointException (2.13), whose text is a page."""
    failures = getattr(error, "failures", None)
    return min(failures.items())[1][0] if failures else error


def _is_damage(cause: BaseException) -> bool:
    if isinstance(cause, ConnectionError):
        return False
    return isinstance(cause, _DAMAGE) or (isinstance(cause, RuntimeError) and bool(_DAMAGE_IN_C.search(str(cause))))
