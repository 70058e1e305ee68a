"""Checkpoints of DeepSpeed with S3: the mark, conversion from Adam, and what universal checkpoints get wrong.

Every host symbol named here was read in deepspeed 0.19.8.
"""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.utils import logger

from s3_megatron.engines import versions
from s3_megatron.engines.deepspeed.layout import is_flat, is_sharded, is_stage3, masters
from s3_megatron.errors import S3Error
from s3_megatron.optim import EXP_AVG_ROOT, S3, from_adam_state, is_s3_state
from s3_megatron.swap import SymbolSwap

Groups = list[dict[str, Any]]

# What a checkpoint's param groups bring along, to the configuration's cost; lr is the scheduler's.
_HYPERPARAMETERS = ("betas", "p", "nesterov", "maximize", "weight_decay")


def guard_other(optimizer: Any, wrapper: Any) -> None:
    """Make an optimizer that is not S3 refuse S3's state, which has Adam's names and another meaning."""

    def refuse(groups: Groups, universal: bool) -> None:
        if groups and is_s3_state(groups):
            raise S3Error(
                f"the checkpoint's optimizer state was written by S3 and cannot be loaded into "
                f"{type(optimizer).__name__}: go on with S3, or load the weights alone: "
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


def guard_s3(optimizer: S3, wrapper: Any, *, from_adam: bool) -> None:
    """Make ``wrapper``, in which S3 is, load only S3's state, or with ``from_adam`` convert Adam's.

    Allocates S3's state, and keeps it as ``safe_get_full_optimizer_state`` and universal checkpoints want it.
    """
    optimizer.load_state_dict = functools.partial(  # type: ignore[method-assign]
        _load_state_dict, optimizer, optimizer.load_state_dict, wrapper, from_adam
    )
    if not is_sharded(wrapper):
        return
    _settle(wrapper)
    if is_flat(wrapper):
        _replace(wrapper, "_link_all_hp_params", lambda link: _followed_by(link, lambda: _settle(wrapper)))
    _guard_universal(optimizer, wrapper, from_adam)


def _load_state_dict(
    optimizer: S3, load: Callable[[dict[str, Any]], None], wrapper: Any, from_adam: bool, state_dict: dict[str, Any]
) -> None:
    """Load one rank's state of an ordinary checkpoint."""
    state_dict = dict(state_dict)
    if _accept(state_dict["param_groups"], optimizer, from_adam, _weights_alone(wrapper, False)):
        state_dict = from_adam_state(state_dict, optimizer)
    load(state_dict)


def _accept(saved: Groups, optimizer: S3, from_adam: bool, weights_alone: str) -> bool:
    """Check saved param groups; says whether their state must be converted from Adam's.

    ``weights_alone`` is the advice how to load no state.

    Raises:
        S3Error: they are not S3's, and conversion was not asked for; or there are more or fewer than this run's.
    """
    ours = optimizer.param_groups
    if len(saved) != len(ours):
        raise S3Error(
            f"the checkpoint has {len(saved)} param groups and this run has {len(ours)}: group the parameters as the "
            "checkpoint's run did"
        )
    if not is_s3_state(saved):
        if not from_adam:
            raise S3Error(
                "the checkpoint's optimizer state was not written by S3: to go on from Adam's (m as it is, r = "
                f'sqrt(v)) add "s3_from_adam": true to the params of optimizer S3; or load the weights alone: '
                f"{weights_alone}"
            )
        return True
    changed = sorted(
        {name for old, new in zip(saved, ours, strict=True) for name in _HYPERPARAMETERS if _of(old, name) != new[name]}
    )
    if changed:
        logger.warning(
            f"S3 goes on with the checkpoint's {', '.join(changed)}: {[_of(saved[0], name) for name in changed]} in "
            f"its first group; this run's configuration has {[ours[0][name] for name in changed]}"
        )
    return False


def _of(group: dict[str, Any], name: str) -> Any:
    return tuple(group[name]) if name == "betas" else group[name]


def _settle(wrapper: Any) -> None:
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


def _guard_universal(optimizer: S3, wrapper: Any, from_adam: bool) -> None:
    """Watch over the loading of universal checkpoints (runtime/base_optimizer.py, runtime/zero/stage3.py)."""
    found: Groups = []
    converting = False

    def look(saved: Groups) -> None:
        nonlocal found, converting
        converting = _accept(saved, optimizer, from_adam, _weights_alone(wrapper, True))
        if converting:
            for old, new in zip(saved, optimizer.param_groups, strict=True):
                params = old["params"]
                old.clear()
                old.update({**new, "params": params})
        found = [{key: value for key, value in group.items() if key != "params"} for group in saved]

    def finish() -> None:
        # ZeRO-3 gives every group the first one's: [0.1, 0.0] of weight decay would become [0.1, 0.1].
        for group, saved in zip(optimizer.param_groups, found, strict=True):
            group.update(saved)
        if converting:
            for master in masters(wrapper):
                optimizer.state[master][EXP_AVG_ROOT].sqrt_()
                optimizer.state[master].pop("step", None)  # by which S3 knows Adam's
        if is_flat(wrapper):
            wrapper._link_all_hp_params()  # and settle: 0.17.6 left r linked in the weights' place
        else:
            _settle(wrapper)

    _see_universal_groups(wrapper, look)
    name = "load_hp_checkpoint_state_from_checkpoint_dir"
    if is_flat(wrapper):
        _replace(wrapper, name, lambda load: _followed_by(_with_somebody_in_every_group(wrapper, load), finish))
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


class _Nobody:
    """Stands in a param group of which this rank holds only padding, and has nothing to load."""

    _hp_mapping = SimpleNamespace(get_optim_state_keys=lambda: ())

    def load_hp_checkpoint_state(self, *args: Any, **kwargs: Any) -> None:
        return None


def _with_somebody_in_every_group(wrapper: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    """Let ZeRO 1 and 2 load a param group without parameters on this rank: the host asks its first one's step.

    (``ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir``: IndexError at ``steps[0]``.)
    """

    @functools.wraps(load)
    def load_hp_checkpoint_state_from_checkpoint_dir(lp_groups_name: str, *args: Any, **kwargs: Any) -> Any:
        nobody: Any = _Nobody()
        groups = getattr(wrapper, lp_groups_name)
        empty = [group for group in groups if all(param._hp_mapping is None for param in group)]
        wrapper.param_names[nobody] = "."
        for group in empty:
            group.append(nobody)
        try:
            return load(lp_groups_name, *args, **kwargs)
        finally:
            del wrapper.param_names[nobody]
            for group in empty:
                group.remove(nobody)

    return load_hp_checkpoint_state_from_checkpoint_dir
