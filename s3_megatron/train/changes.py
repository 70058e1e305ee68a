"""What differs between a checkpoint's run and the one that goes on from it: refused, or one line at the start."""

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.utils import log_single_rank
from megatron.training import get_args

from s3_megatron.errors import S3Error
from s3_megatron.optim import registry
from s3_megatron.optim.spec import flag_of

logger = logging.getLogger(__name__)

# What OptimizerParamScheduler (megatron-core 0.19.2) takes and does not save; loading.py has what it saves.
_UNSAVED = ("lr_warmup_init", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style")

# What ends in a KeyError of torch's where an optimizer is saved as its buffers lie; Megatron compares the other ranks.
_EXPERT_RANKS = ("expert_model_parallel_size", "expert_tensor_parallel_size")

# Flags that compute nothing: how a run is started, watched, saved and ended, and what a start is asked to do.
_BESIDE = (
    *("log", "tensorboard", "timing", "wandb", "one_logger", "watch_dir", "profile", "pytorch_profiler", "nvtx"),
    *("use_pytorch_profiler", "record_", "memory_snapshot", "barrier", "straggler", "disable_straggler", "app_tag"),
    *("save", "load", "ckpt", "dist_ckpt", "async", "non_persistent", "exit", "auto_detect", "verify_integrity"),
    *("finetune", "no_load", "no_save", "override", "use_checkpoint", "use_dist_ckpt", "use_persistent_ckpt"),
    *("use_tokenizer_model_from", "use_mp_args_from", "pretrained_checkpoint"),
    *("rank", "local_rank", "distributed_", "nccl_", "inprocess", "ft_", "enable_ft", "calc_ft", "flight_recorder"),
    *("consumed_", "skipped_", "num_floating_point", "curr_", "do_", "num_workers", "data_cache_path"),
    *("num_dataset_builder_threads", "mmap_bin_files", "dataloader_", "inference", "rl_", "dino", "deepspeed_config"),
    *("num_query_groups",),  # set anew once a model without them is built
    *("manual_gc", "adlr", "train_sync_interval", "config_logger", "lazy_mpu", "te_rng", "start_eval", "eval_interval"),
)

# Flags that no tensor of a checkpoint depends on, beside hyperparameters: rates, schedule, data, samples a step.
_FREE = (
    *("lr", "min_lr", "decoupled_", "weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad"),
    *("train_", "valid_", "test_", "eval_", "global_batch_size", "micro_batch_size", "rampup_", "world_size"),
    *("data_parallel_size", "data_", "split", "mock_data", "seed", "adam_"),
)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Give what ``args`` has of plain values, as a checkpoint keeps them: no objects of the host's."""
    return {name: value for name, value in vars(args).items() if _is_plain(value)}


def texts(args: argparse.Namespace) -> dict[str, str]:
    """Give the ``settings`` of ``args`` as texts, for a file that is no pickle; they compare like the values."""
    return {name: _text(value) for name, value in settings(args).items()}


def compare(saved: Mapping[str, Any]) -> None:
    """Compare Megatron's global arguments with ``saved``, those of the checkpoint's run; says what differs.

    Raises:
        S3Error: a part of the schedule that Megatron does not save is another, or the ranks of experts are, and the
            optimizer's state cannot go to others. The rest of the schedule is compared as
            it is loaded, and our optimizers' hyperparameters with their state.
    """
    args = get_args()
    changed = _changed(saved)
    schedule = [name for name in _UNSAVED if name in changed and _is_used(name, args)]
    if schedule and not (args.override_opt_param_scheduler or args.no_load_optim):
        raise S3Error(
            f"the checkpoint was trained with another schedule ({'; '.join(changed[name] for name in schedule)}), and "
            "Megatron does not save this part of it: give the checkpoint's value, or pass "
            "--override-opt-param-scheduler to go on with this run's schedule"
        )
    moved = [changed[name] for name in _EXPERT_RANKS if name in changed]
    is_bound = args.use_distributed_optimizer and not saved.get("dist_ckpt_optim_fully_reshardable")
    if moved and is_bound and not (args.no_load_optim or args.finetune):
        raise S3Error(
            f"the checkpoint's optimizer state cannot go to other ranks of experts ({'; '.join(moved)}): give its "
            "values, save with --dist-ckpt-optim-fully-reshardable, or pass --no-load-optim to start with fresh state"
        )
    if changed:
        log_single_rank(
            logger,
            logging.WARNING,
            f"this run goes on from a checkpoint of other settings: {'; '.join(changed.values())}",
        )


def announce_end(iteration: int, folder: str) -> None:
    """Log a line where a run that goes on from ``iteration`` of ``folder`` is at its end: Megatron ends in silence."""
    args = get_args()
    if not args.skip_train and args.train_iters and iteration >= args.train_iters:
        log_single_rank(
            logger,
            logging.WARNING,
            f"nothing is left to train: --load {folder} is at iteration {iteration}, and --train-iters is "
            f"{args.train_iters}; to go on give more, and --override-opt-param-scheduler",
        )


def that_bind(saved: Mapping[str, Any]) -> list[str]:
    """Give the flags that are others than in ``saved`` and may be why a checkpoint's tensors do not fit this run."""
    free = (*_FREE, *(spec.field(each.name) for spec in registry.specs() for each in spec.hyperparameters))
    changed = [change for name, change in _changed(saved).items() if not name.startswith(free)]
    was, here = saved.get("ckpt_format"), getattr(get_args(), "ckpt_format", None)
    return changed if was in (None, here) else [*changed, f"--ckpt-format {was}, here {here}"]


def _changed(saved: Mapping[str, Any]) -> dict[str, str]:
    """Give each setting that computes something and is another than in ``saved``: its name, and both values."""
    beside = (*_BESIDE, *(field for spec in registry.specs() for field in spec.switch_fields))
    return {
        name: f"{flag_of(name)} {saved[name]}, here {value}"
        for name, value in settings(get_args()).items()
        if not name.startswith(("_", *beside)) and name in saved and _text(saved[name]) != _text(value)
    }


def watches_arguments(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``megatron.training.checkpointing.check_checkpoint_args``, which compares the model's shape."""

    def check_checkpoint_args(checkpoint_args: argparse.Namespace, *args: Any, **kwargs: Any) -> None:
        original(checkpoint_args, *args, **kwargs)
        compare(settings(checkpoint_args))

    return check_checkpoint_args


def _is_used(name: str, args: argparse.Namespace) -> bool:
    if name == "lr_warmup_init":
        return bool(args.lr_warmup_iters or args.lr_warmup_samples or args.lr_warmup_fraction)
    return bool(args.lr_decay_style == "WSD")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _text(value: Any) -> str:
    """What to compare: a tuple may come back as a list."""
    return str(list(value) if isinstance(value, tuple) else value)
