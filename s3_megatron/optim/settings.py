"""The arguments of S3: their names, and what a step is taken with."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank
from s3_megatron.optim import registry
from s3_megatron.optim.spec import LR, WEIGHT_DECAY, Range

logger = logging.getLogger(__name__)

_RANGES: dict[str, Range] = {
    each.name: each.range for each in (LR, WEIGHT_DECAY, *registry.S3.hyperparameters) if each.range is not None
}
_LR, _DECAY, _BETA, _P = (_RANGES[name] for name in ("lr", "weight_decay", "beta", "p"))

# What S3 reads in a param group.
_OF_GROUPS = ("lr", "beta", "betas", "p", "weight_decay", "nesterov", "maximize", "rounding_seed")
# What others keep in param groups for themselves, and S3 need not know.
_OF_OTHERS = frozenset(
    (
        # torch, its schedulers and AdamW, whose decay is S3's (2.8 to 2.13)
        *("params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"),
        "decoupled_weight_decay",
        # Megatron-LM 0.17.1 to 0.19.2, and NeMo
        *("start_wd", "end_wd", "wd_mult", "lr_mult", "pre_wd_mult", "pre_lr_mult", "is_expert_parallel"),
        *("is_decoupled_lr", "is_vision_model_param", "default_config", "optimizer", "step"),
        # DeepSpeed 0.17.6 to 0.19.8
        *("moe", "ds_process_group", "_ds_source_param_group_id"),
        # labels: Lightning's, timm's
        *("name", "group_name", "lr_scale", "layer_id"),
    )
)


def names_what_it_takes[F: Callable[..., Any]](init: F) -> F:
    """Let an ``__init__`` list its arguments in the TypeError for one that it does not have."""
    kind = init.__qualname__.split(".")[0]
    known = [name for name in inspect.signature(init).parameters if name not in ("self", "params")]

    @functools.wraps(init)
    def __init__(*args: Any, **arguments: Any) -> None:
        unknown = [name for name in arguments if name not in (*known, "params")]
        if unknown:
            raise TypeError(f"{kind} has no argument {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
        init(*args, **arguments)

    return __init__  # type: ignore[return-value]


def report_ignored(group: dict[str, Any]) -> None:
    """Log once, on rank 0, what a param group asks for that S3 has no setting for, but for known notes of others.

    What is None or False asks for nothing: the groups of another optimizer have such.
    """
    known = {*_OF_GROUPS, registry.S3.mark, *_OF_OTHERS}
    ignored = [name for name, value in group.items() if name not in known and value is not None and value is not False]
    if ignored:
        _warn_of_ignored(", ".join(map(repr, ignored)))


@functools.cache
def _warn_of_ignored(names: str) -> None:
    if is_first_rank():
        logger.warning(
            f"S3 ignores {names} in a param group: a group of S3's has {', '.join(_OF_GROUPS)}; implementation, "
            "state_dtype and capturable are the whole optimizer's"
        )


def check_step(group: dict[str, Any]) -> None:
    """Look at what a step is taken with: schedulers and callbacks write into the groups, and checkpoints bring theirs.

    A rate on the device is not read. Compiled code would be compiled again for each rate: the op looks at it there.

    Raises:
        S3Error: a value is out of range: a rate or weight decay that is negative or not finite, a decay, or p.
    """
    (beta1, beta2), p = group["betas"], group["p"]
    if not torch.compiler.is_compiling():
        check_sizes(group["lr"], group["weight_decay"])
    if not _P.holds(p):
        raise S3Error(f"a param group's p is {p}: it must be a finite number {_P}; 3 is the paper's")
    if not (_BETA.holds(beta1) and _BETA.holds(beta2)):
        raise S3Error(f"a param group's betas are {(beta1, beta2)}: both must lie {_BETA}; keep schedulers from them")
    if beta1 != beta2:
        _warn_of_two_betas(beta1, beta2)


def check_sizes(lr: float | Tensor, weight_decay: float) -> None:
    """Raise S3Error for a param group's rate or decay out of range; a rate on the device is not read."""
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    if not on_device and not _LR.holds(float(lr)):
        raise S3Error(f"a param group's lr is {float(lr)}: it must be a finite number {_LR}; look at what writes it")
    if not _DECAY.holds(weight_decay):
        raise S3Error(
            f"a param group's weight_decay is {weight_decay}: it must be a finite number {_DECAY}; look at what writes "
            "it"
        )


_has_warned = False


# Called while a step is compiled, and no part of what is compiled.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_of_two_betas(beta1: float, beta2: float) -> None:
    """Log once a process, on rank 0, that the bound does not hold."""
    global _has_warned
    if not _has_warned and is_first_rank():
        logger.warning(
            f"S3 steps with two betas, {beta1:g} and {beta2:g}: |update| <= 1 holds for one alone (Theorem 2), and a "
            "weight can move by more than lr. If this was not meant, keep what wrote them from S3's param groups: "
            "OneCycleLR and CyclicLR take cycle_momentum=False"
        )
    _has_warned = True
