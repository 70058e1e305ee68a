"""What may be loaded into an optimizer of ours, and what its own checkpoints may be loaded into."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.utils import log_single_rank

from s3_megatron.engines.megatron import groups
from s3_megatron.engines.megatron.config import SpecOptimizerConfig
from s3_megatron.errors import S3Error
from s3_megatron.optim import registry
from s3_megatron.optim.spec import FROM_ADAM, OVERRIDE, Spec
from s3_megatron.optim.state import accept, check_convertible, convert_from_adam, is_marked, written_by

logger = logging.getLogger(__name__)


def guard_own(part: MegatronOptimizer, config: SpecOptimizerConfig, spec: Spec) -> None:
    """Make ``part.load_state_dict`` refuse or convert a foreign state (replaces methods of this instance).

    ``spec`` is that of the optimizer in ``part``.
    """
    # The legacy `torch` format reads a DistributedOptimizer's tensors by a second call.
    tensors_come_later = False

    def on_change(what: str) -> bool:
        if config.asks(OVERRIDE, spec):
            log_single_rank(logger, logging.WARNING, f"{what}: this run's values count")
            return True
        raise S3Error(f"{what}: pass the checkpoint's values, or {spec.flag(OVERRIDE)} to go on with this run's")

    # Under autograd, float32 shards, which are views of the model's parameters, cannot be written in place.
    @torch.no_grad()
    def load_state_dict(state_dict: dict[str, Any]) -> None:
        nonlocal tensors_come_later
        saved = groups_of(state_dict)
        if saved is None:  # the optimizer's own load_state_dict looks at whatever the host makes of it
            original(state_dict)
            return
        foreign = not is_marked(saved, spec)
        if foreign:
            fresh = "pass --no-load-optim to start with fresh state"
            if spec is not config.spec:
                fresh = f"{config.spec.flag('scalar_optimizer')} as in the checkpoint's run, or {fresh}"
            advice = {"ask": f"pass {spec.flag(FROM_ADAM)}", "fresh": fresh}
            check_convertible(saved, spec, asked=config.asks(FROM_ADAM, spec), **advice)
        ours = part.optimizer.param_groups
        kept: list[dict[str, Any]] = []
        if foreign:
            groups.take_ours(saved, ours)
        else:
            accept(saved, [ours[0]] * len(saved), spec, on_change)  # Megatron gives every group the same values
            kept = groups.pair_rates(saved, ours)
        original(state_dict)
        for group, rates in zip(part.optimizer.param_groups, kept, strict=False):
            group.update(rates)
        if foreign:
            tensors_come_later = isinstance(part, DistributedOptimizer) and "param_state" not in state_dict
            if not tensors_come_later:
                convert_from_adam(part.optimizer.state.values(), spec)

    @torch.no_grad()
    def load_parameter_state(*args: Any, **kwargs: Any) -> None:
        nonlocal tensors_come_later
        original_parameters(*args, **kwargs)
        if tensors_come_later:
            convert_from_adam(part.optimizer.state.values(), spec)
            tensors_come_later = False

    original: Callable[..., None] = part.load_state_dict
    part.load_state_dict = load_state_dict
    if isinstance(part, DistributedOptimizer):
        original_parameters: Callable[..., None] = part.load_parameter_state
        part.load_parameter_state = load_parameter_state


def guard_other(part: MegatronOptimizer, chosen_by: str = "--optimizer") -> None:
    """Make ``part.load_state_dict`` refuse the state of an optimizer of ours, which Adam would read as its own.

    ``chosen_by`` is the flag that makes ``part`` another optimizer.
    """
    original: Callable[..., None] = part.load_state_dict

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        refuse_ours(state_dict, chosen_by)
        original(state_dict)

    part.load_state_dict = load_state_dict


def refuse_ours(state_dict: Any, chosen_by: str = "--optimizer") -> None:
    """Raise S3Error where ``state_dict`` is the state of an optimizer of ours, which ``chosen_by`` would continue."""
    if (writer := written_by(groups_of(state_dict) or ())) is not None:
        raise S3Error(
            f"the checkpoint's optimizer state is {registry.title(writer)}'s, which no other can continue: pass "
            f"{chosen_by} {writer}, or --no-load-optim to start with fresh state"
        )


def groups_of(state_dict: Any) -> list[dict[str, Any]] | None:
    """Find the param groups in what an optimizer of megatron-core (0.17.1 to 0.19.2) has saved; None in other shapes.

    FP32Optimizer saves the inner state dict bare; under Megatron-FSDP a DistributedOptimizer saves no groups, but
    ``param_to_group_meta``.
    """
    inner = state_dict.get("optimizer", state_dict) if isinstance(state_dict, Mapping) else None
    found = inner.get("param_groups") if isinstance(inner, Mapping) else None
    if isinstance(found, list) and all(isinstance(group, dict) for group in found):
        return found
    return None
