"""S3's state by name: the mark that tells it from Adam's, and what every way into the optimizer is held to."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from s3_megatron.errors import S3Error

# Megatron-LM and DeepSpeed find optimizer state in their checkpoints by Adam's two names, so S3 goes by them:
# m in the first, the root r = s^(1/p) in the second.
EXP_AVG = "exp_avg"
EXP_AVG_ROOT = "exp_avg_sq"
NAMES = (EXP_AVG, EXP_AVG_ROOT)

# Adam's checkpoints use the same two names with another meaning; this entry of every param group tells them apart.
STATE_MARK = "s3_state"
STATE_FORMAT = "exp_avg=m, exp_avg_sq=s^(1/p)"

_ADVICE = "an Adam state is turned into S3's by s3_megatron.optim.from_adam_state, or start with fresh optimizer state"


def is_s3_state(param_groups: Iterable[dict[str, Any]]) -> bool:
    """Tell whether saved param groups carry S3's mark."""
    return all(group.get(STATE_MARK) == STATE_FORMAT for group in param_groups)


def check_groups(param_groups: Iterable[dict[str, Any]]) -> None:
    """Raise S3Error unless param groups carry S3's mark."""
    if not is_s3_state(param_groups):
        raise S3Error(
            f"this optimizer state was not written by S3 (its param groups lack the mark {STATE_MARK!r}); {_ADVICE}"
        )


def check_entry(entry: Mapping[str, Any], shape: torch.Size, *, marked: bool = False) -> None:
    """Raise S3Error unless a parameter's state is S3's: m and r, or nothing.

    Adam counts its steps in it, which S3 does not. Where it comes with param groups that are ``marked`` as S3's a step
    says nothing: Megatron gives one to every state that it loads; DeepSpeed's ZeRO-3 demands one, and S3's is 0 there.
    """
    if not entry:
        return
    found = ", ".join(map(str, entry))
    step = entry.get("step", 0)
    if not marked and (isinstance(step, Tensor) or step != 0):
        raise S3Error(
            f"the state of a parameter of shape {list(shape)} was not written by S3 (it has {found}); {_ADVICE}"
        )
    if len([name for name in NAMES if name in entry]) == 1 or not entry.keys() & {*NAMES, "step"}:
        raise S3Error(
            f"the state of a parameter of shape {list(shape)} has {found}: S3's are {EXP_AVG} and {EXP_AVG_ROOT}; "
            "start with fresh optimizer state"
        )


def from_adam_state(state_dict: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Turn the state dict of an Adam(W) over the same parameters into one that ``optimizer``, an S3, loads.

    m is taken as it is and r = sqrt(v); the learning rate, decay and betas become those of ``optimizer``.
    Nothing is modified in place.
    """
    state = {
        index: {EXP_AVG: entry[EXP_AVG], EXP_AVG_ROOT: entry[EXP_AVG_ROOT].sqrt()}
        for index, entry in state_dict["state"].items()
    }
    groups = [
        {**{k: v for k, v in ours.items() if k != "params"}, "params": saved["params"]}
        for ours, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    return {"state": state, "param_groups": groups}
