"""Runs under torchrun, from worker.py: checkpoints under other rates, on ranks that hold nothing, and of Adam."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

# isort: split  (the harness turns the rehearsal on, which has to come before Megatron is imported)
from megatron.core.optimizer import ParamKey
from megatron.training import global_vars

from s3_megatron.engines.megatron.checkpoint import guard_other, guard_own
from s3_megatron.optim import S3
from s3_megatron.optim.settings import _warn_of_ignored
from tests.engines.megatron.harness import LR, Run, Scattered, Single, gradients, load, save, set_decay
from tests.rank_checks import refuses, shared_folder

OVERRIDE, KEEP = "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"
KINDS = ("dp_reshardable", "fully_reshardable")


@contextmanager
def flags(*given: str) -> Iterator[None]:
    """Megatron's global arguments, as far as a load reads them."""
    global_vars._GLOBAL_ARGS = SimpleNamespace(**{name: name in given for name in (OVERRIDE, KEEP)}, watch_dir=None)
    try:
        yield
    finally:
        global_vars._GLOBAL_ARGS = None


def rates(run: Run) -> list[tuple[float, float]]:
    return [(group["max_lr"], group["min_lr"]) for group in run.optimizer.param_groups]


def check_other_rates_are_loaded_as_the_flags_say() -> None:
    """Megatron 0.19 pairs groups by their rates: another --lr was a KeyError, with its own flag for that, too.

    Weights and states are the checkpoint's to the bit, and the next step is as long as the new rate says.
    """
    for sharded, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
        _load_under_other_rates(sharded=sharded, dtype=dtype)


def _load_under_other_rates(**layout: Any) -> None:
    first = Run(**layout)
    set_decay(first)
    for step in range(3):
        first.step(gradients(first.net, step))
    folder = shared_folder()
    save(first, folder, "fully_reshardable")

    def loaded(**rates: float) -> Run:
        run = Run(**layout, **rates)
        run.net.load_state_dict(first.net.state_dict())
        load(run, folder, "fully_reshardable")
        return run

    new = {"lr": LR / 4, "min_lr": LR / 8}
    with flags():
        loaded()  # the same rates need no flag
        advice = (f"max_lr {LR}, here {LR / 4}", "--override-opt-param-scheduler", f"--{KEEP.replace('_', '-')}")
        refuses(lambda: loaded(**new), *advice)
    for given, expected in (((OVERRIDE,), (LR / 4, LR / 8)), ((KEEP,), (LR, 0.0))):
        with flags(*given):
            second = loaded(**new)
        assert rates(second) == [expected, expected], f"{given}: {rates(second)}"
        for a, b in zip(first.inner_tensors(), second.inner_tensors(), strict=True):
            assert torch.equal(a, b), f"{layout} {given}"
    assert rates(loaded(**new)) == [(LR / 4, LR / 8)] * 2, "in a loop of one's own: the rates that it has set"


def check_other_groups_are_refused_and_missing_ones_are_megatrons() -> None:
    """A decoupled rate makes a group more; without it, Megatron finds every group that it needs."""

    def with_embedding(rate: float) -> Run:
        ours = {ParamKey(attr="is_embedding_or_output_parameter"): {"max_lr": rate, "min_lr": 0.1}}
        return Run(overrides={**ours, ParamKey(name="*bias"): {"wd_mult": 0.0}})

    plain, decoupled = shared_folder(), shared_folder()
    for run, folder in ((Run(), plain), (with_embedding(0.5), decoupled)):
        run.step(gradients(run.net, 0))
        save(run, folder, "fully_reshardable")
    with flags():
        load(Run(), decoupled, "fully_reshardable")
        refuses(lambda: load(with_embedding(0.25), decoupled, "fully_reshardable"), "max_lr 0.5, here 0.25")
    with flags(OVERRIDE):
        advice = ("2 param groups and this run 3", "--decoupled-lr")
        refuses(lambda: load(with_embedding(0.5), plain, "fully_reshardable"), *advice)
        load(Run(), plain, "fully_reshardable")  # as it advises: what makes groups as in the checkpoint's run
        other = with_embedding(0.25)
        load(other, decoupled, "fully_reshardable")
    assert sorted({rate for rate, _ in rates(other)}) == [LR, 0.25]
    assert _warn_of_ignored.cache_info().currsize == 0, "Megatron's notes in groups are no settings"


def check_a_rank_that_holds_nothing_is_saved_and_loaded() -> None:
    """Where a shard is padding alone, the first save was an AssertionError without a text (Megatron's, of Adam too).

    In Megatron's default format, dp_reshardable, and in the one that changes layouts.
    """
    for kind, net in itertools.product(KINDS, (Single, Scattered)):
        for dtype in (torch.float32, torch.bfloat16):
            first = Run(net=net(), dtype=dtype, clip_grad=0.5)
            set_decay(first)
            for step in range(3):
                first.step(gradients(first.net, step))
            folder = shared_folder()
            save(first, folder, kind)
            second = Run(net=net(), dtype=dtype, clip_grad=0.5)
            second.net.load_state_dict(first.net.state_dict())
            load(second, folder, kind)
            assert len(first.part.optimizer.state) == len(second.part.optimizer.state), "nothing stays of what is lent"
            for step in range(3, 6):
                first.step(gradients(first.net, step))
                second.step(gradients(second.net, step))
            for a, b in zip(first.inner_tensors(), second.inner_tensors(), strict=True):
                assert torch.equal(a, b), f"{kind} {net} {dtype}"
            for name, weight in second.weights().items():
                assert torch.equal(first.weights()[name], weight), f"{kind} {net} {dtype} {name}"
            held: list[int] = [0] * dist.get_world_size()
            dist.all_gather_object(held, len(first.part.optimizer.state))
            assert 0 in held or net is Scattered, held


UNKNOWN: list[Any] = [
    {"state": {"weight": {}}, "param_to_group_meta": {"weight": {"lr": 1.0}}},  # Adam under Megatron-FSDP
    {"images": {"optimizer": {}}, "language": None},  # MimoOptimizer
    {"optimizer": None},
    {"optimizer": {"param_groups": "elsewhere"}},
    {0: {"optimizer": {}}},
    {},
    [],
    None,
]


def check_guards_pass_through_what_they_do_not_know() -> None:
    """With S3 installed, Adam under Megatron-FSDP could not resume: KeyError 'optimizer', in our guard."""
    for state in UNKNOWN:
        for guard in (guard_other, lambda part: guard_own(part, Run().config, S3.spec)):
            seen: list[Any] = []
            part = SimpleNamespace(load_state_dict=seen.append, optimizer=SimpleNamespace(state={}, param_groups=[]))
            guard(part)
            part.load_state_dict(state)
            assert len(seen) == 1 and seen[0] is state, f"{state}: {seen}"


def check_what_a_guard_of_s3_passes_through_is_checked_by_s3_itself() -> None:
    """Adam's state in a shape that the guard does not recognize must not become S3's: S3's own load checks it."""
    run = Run(sharded=False)
    adam = Run(sharded=False, optimizer="adam")
    for made in (run, adam):
        made.step(gradients(made.net, 0))
    state = adam.part.optimizer.state_dict()
    assert type(run.part.optimizer) is S3
    refuses(lambda: run.part.load_state_dict({**state, "param_groups": tuple(state["param_groups"])}), "S3")
