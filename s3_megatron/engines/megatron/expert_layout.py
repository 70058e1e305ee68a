"""Loading what was saved with experts in another number of optimizers.

Megatron (0.17.1 to 0.19.2) makes an optimizer of experts whose data-parallel ranks are not the dense weights': with
--expert-model-parallel-size 1 there is one optimizer, above that there are two. It pairs them by number, and ends in a
RuntimeError or KeyError where there were fewer or more, with Adam, too. Tensors are found by their weights' names all
the same, where a checkpoint's optimizer is fully reshardable; the rest is put together here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from s3_megatron.engines.megatron.checkpoint import groups_of, refuse_ours
from s3_megatron.engines.megatron.groups import Group, find_kinds
from s3_megatron.errors import S3Error

# Where a state dict that is asked for keeps this run's param groups.
_HERE = "s3_param_groups"


def let_experts_move(optimizer: MegatronOptimizer) -> None:
    """Let ``optimizer``, whose parts are all ours, load the state of more or fewer (replaces a method of it)."""
    original: Callable[[Any], None] = optimizer.load_state_dict

    def load_state_dict(state_dict: Any) -> None:
        original(_fitted(state_dict, optimizer.chained_optimizers))

    optimizer.load_state_dict = load_state_dict


def let_matrices_of_experts_move(optimizer: MegatronOptimizer) -> None:
    """Let SoftMuon's ``optimizer``, with its rest, load what has more or fewer param groups (replaces methods of it).

    On its road a checkpoint's groups are merged with this run's, by number, before they are loaded: "Cannot merge two
    lists with different lengths", with Muon, too. So this run asks for none, and finds its own among what was saved.
    """
    save_or_ask: Callable[..., Any] = optimizer.sharded_state_dict
    load: Callable[[Any], None] = optimizer.load_state_dict

    def sharded_state_dict(model: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        made = save_or_ask(model, is_loading, **kwargs)
        for holder in _holders(made) if is_loading else ():
            if all("params" in group for group in holder["param_groups"]):  # else DistributedOptimizer's
                own = [{**group, "params": group["params"].unwrap()} for group in holder.pop("param_groups")]
                holder[_HERE] = LocalNonpersistentObject(own)
        return made

    def load_state_dict(state_dict: Any) -> None:
        holders = [*_holders(state_dict)]
        saved = [group for holder in holders for group in holder.get("param_groups", ())]
        asked = [holder for holder in holders if _HERE in holder]
        for holder in asked:
            own = holder.pop(_HERE)
            taken = zip(find_kinds(saved, own), own, strict=True)
            holder["param_groups"] = [{**group, "params": new["params"]} for group, new in taken]
        load(_only(state_dict, optimizer) if asked else state_dict)

    optimizer.sharded_state_dict, optimizer.load_state_dict = sharded_state_dict, load_state_dict


def _holders(state_dict: Any) -> Iterator[dict[str, Any]]:
    """Yield what has param groups in a state dict, and in those in it."""
    if isinstance(state_dict, dict):
        if "param_groups" in state_dict or _HERE in state_dict:
            yield state_dict
        for key, value in state_dict.items():
            if isinstance(key, int) or key == "optimizer":
                yield from _holders(value)


def _only(state_dict: Any, part: Any) -> Any:
    """Leave out of ``state_dict`` what the checkpoint has for optimizers that ``part`` has not."""
    chained = getattr(part, "chained_optimizers", None)
    if chained is None:
        return state_dict
    numbered, bare = _parted(state_dict)
    return _only(bare, chained[0]) if len(chained) == 1 else {i: _only(numbered[i], x) for i, x in enumerate(chained)}


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
