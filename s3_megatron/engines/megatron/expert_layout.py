"""Loading what was saved with experts in another number of optimizers.

Megatron (0.17.1 to 0.19.2) makes an optimizer of experts whose data-parallel ranks are not the dense weights': with
--expert-model-parallel-size 1 there is one optimizer, above that there are two. It pairs them by number, and ends in a
RuntimeError or KeyError where there were fewer or more, with Adam, too. Tensors are found by their weights' names all
the same, where a checkpoint's optimizer is fully reshardable; the rest is put together here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from s3_megatron.engines.megatron.checkpoint import groups_of
from s3_megatron.engines.megatron.groups import Group, find_kinds


def let_experts_move(optimizer: MegatronOptimizer) -> None:
    """Let ``optimizer``, whose parts are all ours, load the state of more or fewer (replaces a method of it)."""
    original: Callable[[Any], None] = optimizer.load_state_dict

    def load_state_dict(state_dict: Any) -> None:
        original(_fitted(state_dict, optimizer.chained_optimizers))

    optimizer.load_state_dict = load_state_dict


def _fitted(state_dict: Any, parts: list[MegatronOptimizer]) -> Any:
    """Give each of ``parts`` the groups of what was saved beside the tensors of its own.

    A state dict has both: what was saved once for all ranks, in the checkpoint's parts, and each rank's tensors, in
    this run's. One part alone has no number.
    """
    if not isinstance(state_dict, Mapping):
        return state_dict
    numbered = {key: value for key, value in state_dict.items() if isinstance(key, int)}
    bare = {key: value for key, value in state_dict.items() if not isinstance(key, int)}
    if not (numbered and bare):
        return state_dict
    if len(parts) == 1:
        saved = [*numbered.values()]
        return _joined(saved[0], [group for each in saved for group in groups_of(each) or ()], bare, parts[0])
    saved_groups = groups_of(bare) or []
    return {i: _joined(bare, saved_groups, numbered.get(i, {}), part) for i, part in enumerate(parts)}


def _joined(common: dict[str, Any], saved: list[Group], tensors: dict[str, Any], part: Any) -> dict[str, Any]:
    """Join what of a part's state is common to all ranks with ``tensors``, under its own of the ``saved`` groups."""
    here = groups_of(tensors) or [{} for _ in part.param_groups]
    taken = find_kinds(saved, part.param_groups)
    found = [{**group, **own} for group, own in zip(taken, here, strict=True)]
    if "optimizer" in common:
        inner = {**common["optimizer"], **tensors.get("optimizer", {}), "param_groups": found}
        return {**common, **tensors, "optimizer": inner}
    return {**common, **tensors, "param_groups": found}
