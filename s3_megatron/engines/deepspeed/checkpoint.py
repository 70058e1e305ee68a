"""Checkpoints of DeepSpeed with ours: the mark, conversion from Adam, and what universal checkpoints get wrong.

Every host symbol named here was read in deepspeed 0.19.8.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.utils import log_dist, logger

from s3_megatron.engines import versions
from s3_megatron.engines.deepspeed.layout import is_flat, is_sharded, is_stage3, masters
from s3_megatron.errors import S3Error
from s3_megatron.optim import EngineOptimizer, from_adam_state, registry
from s3_megatron.optim.engine_optimizer import warn_of_change
from s3_megatron.optim.spec import FROM_ADAM, NAMES, OVERRIDE, Spec
from s3_megatron.optim.state import accept, check_convertible, convert_from_adam, is_marked, written_by
from s3_megatron.swap import SymbolSwap

Groups = list[dict[str, Any]]

# What else a checkpoint's param groups bring along, to the configuration's cost; lr is the scheduler's.
_TAKEN_OVER = ("maximize", "weight_decay")


def guard_other(optimizer: Any, wrapper: Any) -> None:
    """Make a stock optimizer refuse the state of ours, which has Adam's names and another meaning."""

    def refuse(groups: Groups, universal: bool) -> None:
        if (name := written_by(groups)) is not None:
            title = registry.title(name)
            raise S3Error(
                f"the checkpoint's optimizer state was written by {title} and cannot be loaded into "
                f"{type(optimizer).__name__}: go on with {title}, or load the weights alone: "
                f"{_weights_alone(wrapper, universal)}"
            )

    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: refuse(state_dict["param_groups"], False))
    if is_sharded(wrapper):
        _see_universal_groups(wrapper, lambda groups: refuse(groups, True))


def _weights_alone(wrapper: Any, universal: bool) -> str:
    """Say what loads a checkpoint's weights without the optimizer's state: DeepSpeed's other ways load nothing."""
    source = " of the ordinary checkpoint that this one was made from, without load_universal" if universal else ""
    if not is_stage3(wrapper):
        return f"load_checkpoint(..., load_module_only=True){source}"
    return (
        f"load_checkpoint(..., load_optimizer_states=False){source}, on as many ranks, which takes the checkpoint that "
        "the file latest names"
    )


def guard_own(optimizer: EngineOptimizer, wrapper: Any, *, from_adam: bool, override: bool | None) -> None:
    """Make ``wrapper`` load only the state of ``optimizer``, which is in it, or with ``from_adam`` convert Adam's.

    Where a checkpoint has other values of what defines the state, it is refused, or with ``override`` this run's count;
    with None, for an object that no configuration describes, the checkpoint's, as in plain PyTorch. Allocates the
    state, and keeps it as ``safe_get_full_optimizer_state`` and universal checkpoints want it.
    """
    guard = _LoadGuard(optimizer, wrapper, from_adam, override)
    load = optimizer.load_state_dict

    def lacking(entries: dict[int, Any]) -> dict[int, set[str]]:
        # ZeRO-3's groups have no parameters between steps.
        params = [param for group in optimizer.param_groups for param in group["params"]]
        specs = {i: optimizer.spec_of(params[i]) if i < len(params) else optimizer.spec for i in entries}
        return {i: _lacking(spec) for i, spec in specs.items()}

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        """Load one rank's state of an ordinary checkpoint."""
        state_dict = dict(state_dict)
        if guard.accept(state_dict["param_groups"], universal=False):
            state_dict = from_adam_state(state_dict, optimizer)
        state, names = state_dict["state"], lacking(state_dict["state"])
        load({**state_dict, "state": {i: _without(names[i], entry) for i, entry in state.items()}})

    def stand_in(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state, names = state_dict["state"], lacking(state_dict["state"])
        state_dict["state"] = {i: entry | dict.fromkeys(names[i], _nothing_like(entry)) for i, entry in state.items()}

    optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
    if not is_sharded(wrapper):
        return
    if _lacking(optimizer.spec):
        optimizer.register_state_dict_post_hook(stand_in)
    _init_and_link_state(wrapper)
    if is_flat(wrapper):
        _replace(wrapper, "_link_all_hp_params", lambda link: _followed_by(link, lambda: _init_and_link_state(wrapper)))
    _guard_universal(guard)


def _lacking(spec: Spec) -> set[str]:
    """Name those of Adam's states that the optimizer of ``spec`` has not."""
    return {*NAMES} - {*spec.state_names}


def _nothing_like(entry: dict[str, Any]) -> torch.Tensor:
    """Make zeros in the shape of ``entry``'s state, one element in memory and on the disk.

    checkpoint/ds_to_universal.py takes both of Adam's states of every optimizer, and cuts them into weights.
    """
    first: torch.Tensor = entry[NAMES[0]]
    return first.new_zeros(1).expand(first.numel())


def _without(names: set[str], entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


@dataclass
class _LoadGuard:
    """What decides which checkpoints come into an optimizer."""

    optimizer: EngineOptimizer
    wrapper: Any
    from_adam: bool
    override: bool | None

    def accept(self, saved: Groups, *, universal: bool) -> bool:
        """Check saved param groups; returns whether their state must be converted from Adam's.

        Raises:
            S3Error: they are another optimizer's, and conversion was not asked for; there are more or fewer than this
                run's; or what defines the state is another.
        """
        ours, spec = self.optimizer.param_groups, self.optimizer.spec
        if is_foreign := not is_marked(saved, spec):  # first: others may have other groups
            ask = f'add "{spec.field(FROM_ADAM)}": true to the params of optimizer {spec.title}'
            weights = f"load the weights alone: {_weights_alone(self.wrapper, universal)}"
            check_convertible(saved, spec, asked=self.from_adam, ask=ask, fresh=weights)
        if len(saved) != len(ours):
            raise S3Error(
                f"the checkpoint has {len(saved)} param groups and this run has {len(ours)}: group the parameters as "
                "the checkpoint's run did"
            )
        if is_foreign:
            return True
        accept(saved, ours, spec, self._on_change)
        names = [name for name in _TAKEN_OVER if name in ours[0]]
        pairs = list(zip(saved, ours, strict=True))
        changed = [name for name in names if any(old.get(name) != new[name] for old, new in pairs)]
        if changed:
            logger.warning(
                f"{spec.title} goes on with the checkpoint's {', '.join(changed)}: "
                f"{[saved[0].get(name) for name in changed]} in its first group; this run's configuration has "
                f"{[ours[0][name] for name in changed]}"
            )
        return False

    def _on_change(self, what: str) -> bool:
        if self.override is None:
            return warn_of_change(what)
        if not self.override:
            spec = self.optimizer.spec
            raise S3Error(
                f'{what}: give the checkpoint\'s values, or add "{spec.field(OVERRIDE)}": true to the params of '
                f"optimizer {spec.title} to go on with this run's"
            )
        log_dist(f"{what}: this run's values count", ranks=[0], level=logging.WARNING)
        return True


def _init_and_link_state(wrapper: Any) -> None:
    """Allocate the state that is missing, in S3's dtype, and link it to the parameters that it belongs to.

    DeepSpeed links it once, after the first param group's first step, when the other groups have none yet; then
    ``safe_get_full_optimizer_state`` raises for their parameters (runtime/zero/stage_1_and_2.py,
    ``_lazy_init_hp_params_optimizer_state``). ZeRO-3's universal checkpoints demand a ``step``, which S3 does not
    have; a tensor would be shared by every sub-group.
    """
    optimizer = wrapper.optimizer
    if is_flat(wrapper):
        optimizer.allocate_state()
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
    else:
        wrapper._set_fp32_optimizer_param_groups()
        optimizer.allocate_state()
        wrapper._clear_fp32_optimizer_param_groups()
        for master in masters(wrapper):
            optimizer.state[master]["step"] = 0


def _replace(wrapper: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method of this one ``wrapper``, with which the replacement goes."""
    SymbolSwap("this DeepSpeed").replace(wrapper, name, make)


def _followed_by(first: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(first)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = first(*args, **kwargs)
        then()
        return result

    return both


def _see_universal_groups(wrapper: Any, look: Callable[[Groups], None]) -> None:
    """Show ``look`` the param groups of a universal checkpoint before anything of it is loaded."""
    name = "_load_global_state" if is_flat(wrapper) else "_load_global_state_stage3"
    _replace(wrapper, name, lambda load: _looking_first(load, look))


def _looking_first(load: Callable[..., Any], look: Callable[[Groups], None]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_global_state(saved: dict[str, Any]) -> Any:
        if "param_groups" in saved:  # of a universal checkpoint only
            look(saved["param_groups"])
        return load(saved)

    return load_global_state


def _guard_universal(guard: _LoadGuard) -> None:
    """Watch over the loading of universal checkpoints (runtime/base_optimizer.py, runtime/zero/stage3.py)."""
    optimizer, wrapper = guard.optimizer, guard.wrapper
    found: Groups = []
    converting = False

    def look(saved: Groups) -> None:
        nonlocal found, converting
        converting = guard.accept(saved, universal=True)
        if converting:
            for old, new in zip(saved, optimizer.param_groups, strict=True):
                params = old["params"]
                old.clear()
                old.update({**new, "params": params})
        optimizer.go_on_from(saved)
        found = [_without({"params"}, group) for group in saved]

    def finish() -> None:
        # ZeRO-3 gives every group the first one's: [0.1, 0.0] of weight decay would become [0.1, 0.1].
        for group, saved in zip(optimizer.param_groups, found, strict=True):
            group.update(saved)
        entries = [optimizer.state[master] for master in masters(wrapper)]
        if converting:
            convert_from_adam(entries, optimizer.spec)
            for entry in entries:
                entry.pop("step", None)  # by which ours know Adam's
        for master in masters(wrapper):
            for name in _lacking(optimizer.spec_of(master)):
                optimizer.state[master].pop(name, None)
        if is_flat(wrapper):
            wrapper._link_all_hp_params()  # and inits: 0.17.6 left r linked in the weights' place
        else:
            _init_and_link_state(wrapper)

    _see_universal_groups(wrapper, look)
    name = "load_hp_checkpoint_state_from_checkpoint_dir"
    if is_flat(wrapper):
        _replace(wrapper, name, lambda load: _followed_by(_with_placeholders(wrapper, load), finish))
    elif "param_shapes" in inspect.signature(getattr(wrapper, f"{name}_stage3")).parameters:  # 0.17.6
        _replace(wrapper, f"{name}_stage3", lambda _: _refuse_universal_stage3)
    else:
        _replace(wrapper, f"{name}_stage3", lambda load: _followed_by(load, finish))


def _refuse_universal_stage3(*args: Any) -> None:
    """Take the place of a loader that reads the first sub-group alone, and other machines' ranks as this one's."""
    raise S3Error(
        "this DeepSpeed loads the first param group alone of a ZeRO-3 universal checkpoint, with any optimizer: load "
        f"it with deepspeed {versions.DEEPSPEED.tested[-1]}, or resume the ordinary checkpoint on as many ranks"
    )


class _EmptyGroupPlaceholder:
    """Stands in a param group of which this rank holds only padding, and has nothing to load."""

    _hp_mapping = SimpleNamespace(get_optim_state_keys=lambda: ())

    def load_hp_checkpoint_state(self, *args: Any, **kwargs: Any) -> None:
        return None


def _with_placeholders(wrapper: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    """Let ZeRO 1 and 2 load a param group without parameters on this rank: the host asks its first one's step.

    (``ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir``: IndexError at ``steps[0]``.)
    """

    @functools.wraps(load)
    def load_hp_checkpoint_state_from_checkpoint_dir(lp_groups_name: str, *args: Any, **kwargs: Any) -> Any:
        placeholder: Any = _EmptyGroupPlaceholder()
        groups = getattr(wrapper, lp_groups_name)
        empty = [group for group in groups if all(param._hp_mapping is None for param in group)]
        wrapper.param_names[placeholder] = "."
        for group in empty:
            group.append(placeholder)
        try:
            return load(lp_groups_name, *args, **kwargs)
        finally:
            del wrapper.param_names[placeholder]
            for group in empty:
                group.remove(placeholder)

    return load_hp_checkpoint_state_from_checkpoint_dir
