"""DeepSpeed's checkpoints (0.19.8) in the places, and with the manners, of Megatron's."""

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.training import get_args, print_rank_0
from megatron.training.checkpointing import get_checkpoint_tracker_filename, get_rng_state

from s3_megatron.checkpoints.whole import ABOUT_DEEPSPEED, DEEPSPEED_POINTER
from s3_megatron.errors import S3Error
from s3_megatron.files import write_file
from s3_megatron.optim import registry
from s3_megatron.optim.spec import FROM_ADAM
from s3_megatron.train import changes, loading

LATEST_UNIVERSAL = "latest_universal"  # as DEEPSPEED_POINTER, of a universal checkpoint
_NAME = re.compile(r"iter_(\d+)")
_STATE = "s3_megatron"  # our key among DeepSpeed's
_COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
# What a checkpoint fits: this model, on as many ranks.
_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size", "world_size")
_PRECISION = ("bf16", "fp16")  # not written down before 2026-12
# And what the weights alone need not fit: below ZeRO-3 every rank has all of them, in one file.
_OF_THE_STATE = ("zero_stage", "world_size", *_PRECISION)
_FRESH = "pass --no-load-optim to go on from its weights with fresh state and the schedule from its beginning"


def save(
    iteration: int,
    model: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    num_floating_point_operations_so_far: float,
    *_unused: Any,
    **_unused_too: Any,
) -> None:
    """Replace ``megatron.training.training.save_checkpoint``: write --save/iter_N, then name it the latest.

    A run that dies meanwhile resumes from the one before, which goes only after that (--save-retain-interval).
    """
    args, engine = get_args(), model[0].engine
    folder, tag = Path(args.save), f"iter_{iteration:07d}"
    before = _latest(folder, DEEPSPEED_POINTER)
    if dist.get_rank() == 0 and tag != before:
        shutil.rmtree(folder / tag, ignore_errors=True)  # what a kill left there, perhaps by more ranks
    state = {
        "iteration": iteration,
        "num_floating_point_operations_so_far": num_floating_point_operations_so_far,
        "counters": {name: getattr(args, name) for name in _COUNTERS},
        "opt_param_scheduler": opt_param_scheduler.state_dict(),
        "rng_state": get_rng_state("torch", None, None)[0],
        "settings": changes.settings(args),
    }
    # ds_to_universal demands the second key under ZeRO 1 and 2.
    engine.save_checkpoint(folder, tag, {_STATE: state, "universal_checkpoint_info": {}}, save_latest=False)
    if dist.get_rank() == 0:  # every rank has written: save_checkpoint ends with a barrier
        files = {path.name: path.stat().st_size for path in (folder / tag).glob("*_states.pt")}
        about = _about(engine) | {"files": files, "settings": changes.texts(args)}
        write_file(folder / tag / ABOUT_DEEPSPEED, json.dumps(about, indent=2).encode())
        write_file(folder / DEEPSPEED_POINTER, tag.encode())
        _prune(folder, before, tag, args.save_retain_interval)
    dist.barrier()
    print_rank_0(f"  saved checkpoint {folder / tag}")


def _prune(folder: Path, before: str | None, tag: str, interval: int | None) -> None:
    """Remove the checkpoint before this one unless its iteration is a multiple of ``interval``, as Megatron does.

    A folder that a person named otherwise stays.
    """
    if interval is None or before in (None, tag) or not _NAME.fullmatch(before) or _iteration(before) % interval == 0:
        return
    if not (folder / before).is_symlink():
        shutil.rmtree(folder / before, ignore_errors=True)


def load(engine: Any, opt_param_scheduler: Any) -> tuple[int, float]:
    """Load what --load holds, in place; returns its iteration and floating-point operations, or zeros.

    With --no-load-optim, as in Megatron, the weights, the place in the data and the random state.

    Raises:
        S3Error: the checkpoint is Megatron's, incomplete, of another model, optimizer, stage or number of ranks; or
            none is there and --exit-on-missing-checkpoint says that one must be.
    """
    args = get_args()
    if args.load is None:
        return 0, 0
    folder, universal = Path(args.load), engine.load_universal_checkpoint()
    name = LATEST_UNIVERSAL if universal else DEEPSPEED_POINTER
    tag = _latest(folder, name) if args.ckpt_step is None else f"iter_{args.ckpt_step:07d}"
    if tag is None:
        if Path(get_checkpoint_tracker_filename(args.load)).exists():
            raise S3Error(f"--load {folder} holds Megatron's checkpoints: go on with s3_megatron.train.pretrain_gpt")
        if universal or args.exit_on_missing_checkpoint:
            raise S3Error(f"--load {folder} has no file {name!r}, which names the checkpoint to load")
        print_rank_0(f"no checkpoint in {folder}: training starts from random weights")
        return 0, 0
    saved: dict[str, str] = {}
    if universal and args.no_load_optim:
        raise S3Error(
            "--no-load-optim loads the weights of an ordinary checkpoint, on any number of ranks below ZeRO-3: take "
            "checkpoint.load_universal out of the DeepSpeed configuration"
        )
    if not universal:
        saved = _check(folder / tag, engine)
    elif (newer := _latest(folder, DEEPSPEED_POINTER)) is not None and _iteration(newer) > _iteration(tag):
        raise S3Error(
            f"--load {folder} has {newer}, which is newer than the universal {tag}: take checkpoint.load_universal "
            "out of the DeepSpeed configuration, which is for the first start on other ranks only"
        )
    with loading.watched(lambda: folder / tag, lambda: changes.that_bind(saved)):
        loaded, client = engine.load_checkpoint(
            os.fspath(folder), tag, load_lr_scheduler_states=False, **_weights_alone(engine)
        )
    if loaded is None or _STATE not in client:
        raise S3Error(f"{folder / tag} is not a complete checkpoint of pretrain_gpt_deepspeed: name another one")
    state = client[_STATE]
    changes.compare(state.get("settings", {}))  # not there before 2026-12
    for counter, value in state["counters"].items():
        setattr(args, counter, value)
    update_num_microbatches(consumed_samples=args.consumed_train_samples, verbose=True)
    if not args.no_load_optim:
        opt_param_scheduler.load_state_dict(state["opt_param_scheduler"])
    _set_rng_state(state["rng_state"])
    what = ": the weights alone, with fresh optimizer state and the schedule from its beginning"
    print_rank_0(
        f"  loaded checkpoint {folder / tag}, iteration {state['iteration']}{what if args.no_load_optim else ''}"
    )
    changes.announce_end(state["iteration"], args.load)
    return state["iteration"], state["num_floating_point_operations_so_far"]


def _latest(folder: Path, name: str) -> str | None:
    return (folder / name).read_text(encoding="utf-8").strip() if (folder / name).is_file() else None


def _iteration(name: str) -> int:
    """Read the N of iter_N and of iter_N_universal; a folder that a person named otherwise counts as the newest."""
    found = _NAME.match(name)
    return int(found[1]) if found else sys.maxsize


def _about(engine: Any) -> dict[str, Any]:
    args = get_args()
    return {
        "zero_stage": engine.zero_optimization_stage(),
        **{name: getattr(args, name) for name in _SHAPE + _PRECISION},
    }


def _weights_alone(engine: Any) -> dict[str, bool]:
    """Give the argument with which ``load_checkpoint`` leaves the optimizer as it is, if that is asked for.

    In ZeRO-3 ``load_module_only`` loads no weights.
    """
    if not get_args().no_load_optim:
        return {}
    return {"load_optimizer_states": False} if engine.zero_optimization_stage() == 3 else {"load_module_only": True}


def _check(folder: Path, engine: Any) -> dict[str, str]:
    """Raise S3Error where ``folder`` cannot be loaded as it is; returns the settings of its run, as texts."""
    if not (folder / ABOUT_DEEPSPEED).is_file():
        raise S3Error(f"{folder} is not a complete checkpoint of pretrain_gpt_deepspeed: name another one")
    ours, is_fresh = _about(engine), get_args().no_load_optim
    saved = json.loads((folder / ABOUT_DEEPSPEED).read_text(encoding="utf-8"))
    is_whole = 3 not in (saved["zero_stage"], ours["zero_stage"])
    known = [name for name in ours if name in saved or name not in _PRECISION]
    wrong = [name for name in known if saved[name] != ours[name]]
    bound = [name for name in wrong if not (is_whole and name in _OF_THE_STATE)]
    if bound or (wrong and not is_fresh):
        others = ", ".join(f"{name} {saved[name]} (this run: {ours[name]})" for name in wrong)
        raise S3Error(
            f"{folder} was written with {others}: run it as it was, or, for other ranks, convert it with "
            'DeepSpeed\'s ds_to_universal and set "checkpoint": {"load_universal": true} in the configuration'
            f"{'' if bound else f', or {_FRESH}'}"
        )
    settings: dict[str, str] = saved.get("settings", {})  # not there before 2026-12
    if not is_fresh:
        _check_optimizer(folder, settings.get("optimizer"))
    return settings


def _check_optimizer(folder: Path, wrote: str | None) -> None:
    """Raise S3Error where another optimizer ``wrote`` the state in ``folder``, in this entry's flags."""
    args = get_args()
    if wrote in (None, args.optimizer):
        return
    spec, convert = registry.find(args.optimizer), ""
    if wrote == "adam" and spec is not None and spec.from_adam is not None:
        if getattr(args, spec.field(FROM_ADAM)):
            return
        convert = f", pass {spec.flag(FROM_ADAM)} to convert it"
    raise S3Error(
        f"{folder} has the optimizer state of --optimizer {wrote}, here {args.optimizer}: give its value{convert}, or "
        f"{_FRESH}"
    )


def _set_rng_state(state: dict[str, Any]) -> None:
    """Set what ``megatron.training.checkpointing.get_rng_state`` (0.19.2) read; ranks share one, as in Megatron."""
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
