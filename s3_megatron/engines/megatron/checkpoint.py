"""What may be loaded into S3, and what S3's own checkpoints may be loaded into."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, FP32Optimizer, MegatronOptimizer

from s3_megatron.engines.megatron.config import S3OptimizerConfig
from s3_megatron.errors import S3Error
from s3_megatron.optim import EXP_AVG_ROOT, is_s3_state
from s3_megatron.optim.state import STATE_MARK

_HYPERPARAMETERS = ("betas", "p", "nesterov")


def guard_s3(part: MegatronOptimizer, config: S3OptimizerConfig) -> None:
    """Make ``part.load_state_dict`` refuse or convert a foreign state (replaces methods of this instance)."""

    def convert_roots() -> None:
        for state in part.optimizer.state.values():
            state[EXP_AVG_ROOT].sqrt_()

    # The legacy `torch` format reads a DistributedOptimizer's tensors by a second call.
    tensors_come_later = False

    # Under autograd, float32 shards, which are views of the model's parameters, cannot be written in place.
    @torch.no_grad()
    def load_state_dict(state_dict: dict[str, Any]) -> None:
        nonlocal tensors_come_later
        saved = _param_groups(part, state_dict)
        foreign = not is_s3_state(saved)
        if foreign and not config.s3_from_adam:
            raise S3Error(
                "the checkpoint's optimizer state is not S3's: pass --s3-from-adam to convert Adam's (m as is, "
                "r = sqrt(v)), or --no-load-optim to start with fresh state"
            )
        if foreign:
            _take_our_groups(saved, part.optimizer.param_groups)
        else:
            _check_hyperparameters(saved, part.optimizer.param_groups, override=config.s3_override_hyperparameters)
        original(state_dict)
        if foreign:
            tensors_come_later = isinstance(part, DistributedOptimizer) and "param_state" not in state_dict
            if not tensors_come_later:
                convert_roots()

    @torch.no_grad()
    def load_parameter_state(*args: Any, **kwargs: Any) -> None:
        nonlocal tensors_come_later
        original_parameters(*args, **kwargs)
        if tensors_come_later:
            convert_roots()
            tensors_come_later = False

    original: Callable[..., None] = part.load_state_dict
    part.load_state_dict = load_state_dict
    if isinstance(part, DistributedOptimizer):
        original_parameters: Callable[..., None] = part.load_parameter_state
        part.load_parameter_state = load_parameter_state


def guard_adam(part: MegatronOptimizer) -> None:
    """Make ``part.load_state_dict`` refuse S3's state, which Adam would read without complaint."""
    original: Callable[..., None] = part.load_state_dict

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        if any(STATE_MARK in group for group in _param_groups(part, state_dict)):
            raise S3Error(
                "the checkpoint's optimizer state is S3's, which no other optimizer can continue: pass "
                "--optimizer s3, or --no-load-optim to start with fresh state"
            )
        original(state_dict)

    part.load_state_dict = load_state_dict


def _param_groups(part: MegatronOptimizer, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """Find the saved param groups; FP32Optimizer saves the inner state dict bare (megatron-core 0.17.1 to 0.19.2)."""
    inner = state_dict if isinstance(part, FP32Optimizer) else state_dict["optimizer"]
    groups: list[dict[str, Any]] = inner["param_groups"]
    return groups


def _take_our_groups(saved: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    """Turn Adam's saved groups into ours, in place, keeping which parameters they hold.

    Megatron pairs groups by rates and multipliers (``param_group_identifier_keys``), and the rates differ after a
    change of optimizer; both runs list them in one order, so they are paired by it.
    """
    if [group.get("wd_mult") for group in saved] != [group.get("wd_mult") for group in ours]:
        raise S3Error(
            f"the Adam checkpoint has {len(saved)} param groups and this run {len(ours)}, or others: convert with "
            "the same weight-decay and learning-rate overrides as the checkpoint's run"
        )
    for old, new in zip(saved, ours, strict=True):
        kept: dict[str, Any] = {key: old[key] for key in ("params", "step") if key in old}
        old.clear()
        old.update({**new, **kept})


def _check_hyperparameters(saved: list[dict[str, Any]], ours: list[dict[str, Any]], *, override: bool) -> None:
    """Compare what defines the state; with ``override`` the saved values give way, in place."""
    current = ours[0]  # Megatron gives every group the same ones
    for group in saved:
        for name in _HYPERPARAMETERS:
            # A checkpoint may hold the pair of betas as a list.
            before = tuple(group[name]) if name == "betas" else group[name]
            if before == current[name]:
                continue
            if not override:
                raise S3Error(
                    f"the checkpoint was trained with S3 {name}={before} and this run asks for {name}="
                    f"{current[name]}: pass the checkpoint's value, or --s3-override-hyperparameters to change it"
                )
            group[name] = current[name]
