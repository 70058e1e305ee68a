"""An optimizer's state by name: the mark that tells it from Adam's, and what every way into it is held to.

Imports no torch, for the Specs, which recipes are made from, take their names and conversions from here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from s3_megatron.errors import S3Error
from s3_megatron.optim.spec import NAMES, Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from s3_megatron.optim.engine_optimizer import EngineOptimizer

Groups = Sequence[dict[str, Any]]

# S3 has m in the first, the root r = s^(1/p) in the second.
EXP_AVG, EXP_AVG_ROOT = NAMES


def s3_from_adam(entry: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Make S3's state of a parameter of its Adam state: m as it is, r = sqrt(v); modifies nothing."""
    return {EXP_AVG: entry[EXP_AVG], EXP_AVG_ROOT: entry[EXP_AVG_ROOT].sqrt()}


def is_marked(param_groups: Groups, spec: Spec) -> bool:
    """Whether all saved param groups carry the mark of ``spec``."""
    mark, wanted = spec.mark, spec.state_format
    return all(group.get(mark) == wanted for group in param_groups)


def written_by(param_groups: Groups) -> str | None:
    """Name the optimizer of this package whose mark one of the groups carries, whether or not it is known here."""
    marks = (key for group in param_groups for key, value in group.items() if isinstance(value, str))
    return next((key.removesuffix("_state") for key in marks if key.endswith("_state")), None)


def check_convertible(param_groups: Groups, spec: Spec, *, asked: bool, ask: str, fresh: str) -> None:
    """Raise S3Error unless a state without the mark of ``spec`` is Adam's, and ``asked`` says to convert it.

    No optimizer of this package can continue another's. ``ask`` is the advice how to ask, ``fresh`` how to load no
    state.
    """
    writer = written_by(param_groups)
    if writer == spec.name:
        raise S3Error(
            f"the checkpoint's optimizer state is {spec.title}'s in another form than {spec.state_format!r}: load it "
            f"with the version of s3_megatron that wrote it, or {fresh}"
        )
    if writer is not None:
        raise S3Error(
            f"the checkpoint's optimizer state was written by optimizer {writer}, and {spec.title} cannot continue it: "
            f"go on with {writer}, or {fresh}"
        )
    if not asked:
        convert = f"{ask} to convert Adam's ({spec.from_adam_help}), or " if spec.from_adam else ""
        raise S3Error(f"the checkpoint's optimizer state was not written by {spec.title}: {convert}{fresh}")


def check_groups(param_groups: Groups, spec: Spec) -> None:
    """Raise S3Error unless param groups carry the mark of ``spec``."""
    if not is_marked(param_groups, spec):
        raise S3Error(
            f"this optimizer state was not written by {spec.title} (its param groups lack the mark {spec.mark!r}); "
            f"{_advice(spec)}"
        )


def check_entry(entry: Mapping[str, Any], shape: "torch.Size", spec: Spec, *, marked: bool = False) -> None:
    """Raise S3Error unless a parameter's state is one of ``spec``: its tensors, or nothing.

    Adam counts its steps in it, which no optimizer here does. Where it comes with param groups that are ``marked`` a
    step says nothing: Megatron gives one to every state that it loads; DeepSpeed's ZeRO-3 demands one, which is 0 here.
    """
    if not entry:
        return
    found = ", ".join(map(str, entry))
    step, names = entry.get("step", 0), spec.state_names
    if not marked and (not isinstance(step, Real) or step != 0):  # torch's is a tensor
        raise S3Error(
            f"the state of a parameter of shape {list(shape)} was not written by {spec.title} (it has {found}); "
            f"{_advice(spec)}"
        )
    mine, adams = entry.keys() & {*names}, entry.keys() & {*NAMES}
    if 0 < len(mine) < len(names) or adams - mine or not (mine or "step" in entry):
        raise S3Error(
            f"the state of a parameter of shape {list(shape)} has {found}: {spec.title}'s are {' and '.join(names)}; "
            "start with fresh optimizer state"
        )


def accept(saved: Groups, ours: Groups, spec: Spec, on_change: Callable[[str], bool]) -> None:
    """Compare what defines the state, and ``spec.road``, between saved param groups and this run's, one by one.

    Where it differs ``on_change`` gets a clause that says so: it raises, or returns whether this run's values count,
    which are then written into ``saved`` in place.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for old, new in zip(saved, ours, strict=True):
        for key in (*spec.state_keys, *spec.road):
            if key in old and key in new and _plain(old[key]) != _plain(new[key]):
                changed.setdefault(key, (_plain(old[key]), _plain(new[key])))
    if not changed:
        return
    before, now = (", ".join(f"{key}={pair[i]}" for key, pair in changed.items()) for i in (0, 1))
    if on_change(f"the state was made by {spec.title} with {before} and this run asks for {now}"):
        for old, new in zip(saved, ours, strict=True):
            old.update({key: new[key] for key in changed})


def convert_from_adam(entries: Iterable[dict[str, Any]], spec: Spec) -> None:
    """Turn parameters' Adam states into those of ``spec``, in place.

    A step stays: some hosts want one, and remove or replace it themselves.
    """
    assert spec.from_adam is not None, "who asks for it has been refused"
    for entry in entries:
        if entry:
            made = spec.from_adam(entry)
            for name in NAMES:
                entry.pop(name, None)
            entry.update(made)


def from_adam_state(state_dict: dict[str, Any], optimizer: "EngineOptimizer") -> dict[str, Any]:
    """Turn the state dict of an Adam(W) over the same parameters into one that ``optimizer``, an S3, loads.

    m is taken as it is and r = sqrt(v); the learning rate, decay and betas become those of ``optimizer``.
    Nothing is modified in place.

    Raises:
        S3Error: the state is not Adam's, or ``optimizer`` has no such conversion.
    """
    spec = optimizer.spec
    if (writer := written_by(state_dict["param_groups"])) is not None:
        raise S3Error(f"this optimizer state was written by {writer} and not by Adam: load it as it is, into {writer}")
    if spec.from_adam is None:
        raise S3Error(f"{spec.title} cannot go on from Adam's state: start with fresh optimizer state")
    state = {index: {name: entry[name] for name in NAMES} for index, entry in state_dict["state"].items()}
    convert_from_adam(state.values(), spec)
    groups = [
        {**{k: v for k, v in ours.items() if k != "params"}, "params": saved["params"]}
        for ours, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _plain(value: Any) -> Any:
    """A checkpoint may hold a pair as a list."""
    return tuple(value) if isinstance(value, list) else value


def _advice(spec: Spec) -> str:
    fresh = "start with fresh optimizer state"
    if spec.from_adam is None:
        return fresh
    return f"an Adam state is turned into {spec.title}'s by s3_megatron.optim.from_adam_state, or {fresh}"
