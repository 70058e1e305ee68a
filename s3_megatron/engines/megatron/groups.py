"""Pairing a checkpoint's param groups with this run's, whose rates may be others.

megatron-core pairs groups by all that tells them apart (``param_group_identifier_keys``), since 0.19 the rates
included, so that a run with another rate found no group of its own (KeyError). Nothing of S3's state is in a group.
"""

import logging
from typing import Any

from megatron.core.utils import log_single_rank

from s3_megatron.errors import S3Error

logger = logging.getLogger(__name__)

Group = dict[str, Any]

# What the scheduler reads of a group (megatron-core 0.17.1 to 0.19.2, OptimizerParamScheduler), and what else tells
# groups apart.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd", "lr_mult")
_KINDS = ("wd_mult", "is_expert_parallel", "is_decoupled_lr", "optimizer")

_OTHER_GROUPS = (
    "the checkpoint has {} param groups and this run {}, or others: leave what makes groups (--decoupled-lr, "
    "weight-decay and learning-rate overrides) as in the checkpoint's run, or pass --no-load-optim to start with fresh "
    "state"
)


def take_ours(saved: list[Group], ours: list[Group]) -> None:
    """Turn Adam's ``saved`` groups into ours, in place, keeping which parameters they hold."""
    _check_kinds(saved, ours)
    for old, new in zip(saved, ours, strict=True):
        kept: Group = {key: old[key] for key in ("params", "step") if key in old}
        old.clear()
        old.update({**new, **kept})


def pair_rates(saved: list[Group], ours: list[Group]) -> list[Group]:
    """Give S3's ``saved`` groups our rates, in place, so that Megatron finds each of ours among them.

    Returns the rates, one dict a group of ours, to write into the groups once they are loaded: the checkpoint's under
    ``--use-checkpoint-opt-param-scheduler``, none otherwise.

    Raises:
        S3Error: rates have changed, and neither flag says whose count; or the groups differ in more than rates.
    """
    known = [_values(group, _KINDS + _RATES) for group in saved]
    if all(_values(group, _KINDS + _RATES) in known for group in ours):
        return []
    _check_kinds(saved, ours)
    before = [{key: group[key] for key in _RATES if key in group} for group in saved]
    changes = "; ".join(
        dict.fromkeys(
            f"{key} {old.get(key)}, here {new.get(key)}"
            for old, new in zip(before, ours, strict=True)
            for key in _RATES
            if old.get(key) != new.get(key)
        )
    )
    chosen = _chosen()
    if chosen is None:
        raise S3Error(
            f"the checkpoint was trained with other rates ({changes}): pass --override-opt-param-scheduler to go on "
            "with this run's schedule, or --use-checkpoint-opt-param-scheduler with the checkpoint's"
        )
    for old, new in zip(saved, ours, strict=True):
        for key in _RATES:
            old.pop(key, None)
        old.update({key: new[key] for key in _RATES if key in new})
    if chosen == "checkpoint":
        return before
    log_single_rank(logger, logging.WARNING, f"going on with this run's rates, not the checkpoint's: {changes}")
    return []


def find_kinds(saved: list[Group], ours: list[Group]) -> list[Group]:
    """Find for each of ours the one of the ``saved`` groups with its kind and rates, or its kind; experts or not.

    Returns copies, each with our mark of experts.

    Raises:
        S3Error: none has the kind of one of ours.
    """
    kinds = tuple(key for key in _KINDS if key != "is_expert_parallel")
    found: list[Group] = []
    for new in ours:
        alike = [old for old in saved if _values(old, kinds) == _values(new, kinds)]
        alike = [old for old in alike if _values(old, _RATES) == _values(new, _RATES)] or alike
        if not alike:
            raise S3Error(_OTHER_GROUPS.format(len(saved), len(ours)))
        found.append({**alike[0], "is_expert_parallel": new["is_expert_parallel"]})
    return found


def _check_kinds(saved: list[Group], ours: list[Group]) -> None:
    """Raise S3Error unless both list the same groups, but for their rates, in one order."""
    if [_values(group, _KINDS) for group in saved] != [_values(group, _KINDS) for group in ours]:
        raise S3Error(_OTHER_GROUPS.format(len(saved), len(ours)))


def _values(group: Group, keys: tuple[str, ...]) -> tuple[Any, ...]:
    # As megatron-core, which in NeMo goes by other names: a missing value is None.
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)


def _chosen() -> str | None:
    """Whose rates count: "run", "checkpoint", or None where the flags do not say; in a loop of one's own the run's."""
    from megatron.training.global_vars import _GLOBAL_ARGS as args

    if args is None or getattr(args, "override_opt_param_scheduler", False):
        return "run"
    return "checkpoint" if getattr(args, "use_checkpoint_opt_param_scheduler", False) else None
