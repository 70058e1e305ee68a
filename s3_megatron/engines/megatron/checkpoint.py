"""What may be loaded into S3, and what S3's own checkpoints may be loaded into."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from s3_megatron.engines.megatron import groups
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
        saved = _param_groups(state_dict)
        if saved is None:  # S3.load_state_dict looks at whatever the host makes of it
            original(state_dict)
            return
        foreign = not is_s3_state(saved)
        if foreign and not config.s3_from_adam:
            raise S3Error(
                "the checkpoint's optimizer state is not S3's: pass --s3-from-adam to convert Adam's (m as is, "
                "r = sqrt(v)), or --no-load-optim to start with fresh state"
            )
        ours = part.optimizer.param_groups
        kept: list[dict[str, Any]] = []
        if foreign:
            groups.take_ours(saved, ours)
        else:
            _check_hyperparameters(saved, ours, override=config.s3_override_hyperparameters)
            kept = groups.pair_rates(saved, ours)
        original(state_dict)
        for group, rates in zip(part.optimizer.param_groups, kept, strict=False):
            group.update(rates)
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
        if any(STATE_MARK in group for group in _param_groups(state_dict) or ()):
            raise S3Error(
                "the checkpoint's optimizer state is S3's, which no other optimizer can continue: pass "
                "--optimizer s3, or --no-load-optim to start with fresh state"
            )
        original(state_dict)

    part.load_state_dict = load_state_dict


def _param_groups(state_dict: Any) -> list[dict[str, Any]] | None:
    """Find the param groups in what an optimizer of megatron-core (0.17.1 to 0.19.2) has saved; None in other shapes.

    FP32Optimizer saves the inner state dict bare; under Megatron-FSDP a DistributedOptimizer saves no groups, but
    ``param_to_group_meta``.
    """
    inner = state_dict.get("optimizer", state_dict) if isinstance(state_dict, Mapping) else None
    found = inner.get("param_groups") if isinstance(inner, Mapping) else None
    if isinstance(found, list) and all(isinstance(group, dict) for group in found):
        return found
    return None


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
