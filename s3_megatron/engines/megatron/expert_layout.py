"""Loading what was saved with experts in another number of optimizers.

Megatron (0.17.1 to 0.19.2) makes an optimizer of experts whose data-parallel ranks are not the dense weights': with
--expert-model-parallel-size 1 there is one optimizer, above that there are two. It pairs them by number, and ends in a
RuntimeError or KeyError where there were fewer or more, with Adam, too. Tensors are found by their weights' names all
the same, where a checkpoint's optimizer is fully reshardable; the rest is put together here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from s3_megatron.engines.megatron.checkpoint import groups_of, refuse_ours
from s3_megatron.engines.megatron.groups import Group, find_kinds
from s3_megatron.errors import S3Error


def let_experts_move(optimizer: MegatronOptimizer) -> None:
    """Let ``optimizer``, whose parts are all ours, load the state of more or fewer (replaces a method of it)."""
    original: Callable[[Any], None] = optimizer.load_state_dict

    def load_state_dict(state_dict: Any) -> None:
        original(_fitted(state_dict, optimizer.chained_optimizers))

    optimizer.load_state_dict = load_state_dict


def name_what_does_not_fit(optimizer: MegatronOptimizer) -> None:
    """Let ``optimizer``, which is another's, refuse in one line what ours would put together (replaces a method)."""
    if type(optimizer) is not ChainedOptimizer:
        return
    original: Callable[[Any], None] = optimizer.load_state_dict

    def load_state_dict(state_dict: Any) -> None:
        numbered, bare = _parted(state_dict)
        if numbered and bare:
            for saved in (bare, *numbered.values()):
                refuse_ours(saved)
            raise S3Error(
                "the checkpoint's experts are in another number of optimizers than this run's, and Megatron pairs them "
                "by number: give the checkpoint's --expert-model-parallel-size (1 and above are two kinds), or pass "
                "--no-load-optim to start with fresh state"
            )
        original(state_dict)

    optimizer.load_state_dict = load_state_dict


def _parted(state_dict: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Part what has the number of an optimizer from what has none; a list, or another's dict, gives nothing."""
    if not isinstance(state_dict, Mapping):
        return {}, {}
    numbered = {key: value for key, value in state_dict.items() if isinstance(key, int)}
    return numbered, {key: value for key, value in state_dict.items() if key not in numbered}


def _fitted(state_dict: Any, parts: list[MegatronOptimizer]) -> Any:
    """Give each of ``parts`` the groups of what was saved beside the tensors of its own.

    A state dict has both: what was saved once for all ranks, in the checkpoint's parts, and each rank's tensors, in
    this run's. One part alone has no number.
    """
    numbered, bare = _parted(state_dict)
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
