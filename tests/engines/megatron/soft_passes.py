"""Checks for worker.py: SoftSignum's single pass under Megatron does what the host's separate passes do."""

from typing import Any

import torch

from s3_megatron.watch import statistics
from tests.engines.megatron.harness import Run, gradients, since
from tests.engines.megatron.passes import MOVING_SCALE, TWENTY, Experts, counted, in_step, separate

# m, and so a soft step, depends on the size of the gradients: where the host multiplies twice and the single pass once,
# each of 20 steps may round a soft update another way, by 2^-24 of it, and what is left of m's cancelling is as large.
NEAR = 1e-5
SOFT = {"optimizer": "softsignum", "softsignum_total_steps": TWENTY, "softsignum_soft_start": 0.5}


def both(**setting: Any) -> tuple[Run, Run]:
    """A run in a single pass and one in the host's, both counting their updates."""
    runs = Run(**SOFT, **setting), separate(**SOFT, **setting)
    for run in runs:
        for part in run.optimizer.chained_optimizers:
            part.optimizer.update_statistics = statistics.zeros()
    return runs


def compared(merged: Run, apart: Run, near: float, **rest: Any) -> None:
    """Through both phases; the temperature and the last step's statistics are equal, too."""
    in_step(merged, apart, near=near, **rest)
    for one, other in zip(merged.optimizer.chained_optimizers, apart.optimizer.chained_optimizers, strict=True):
        ours, theirs = one.optimizer, other.optimizer
        assert ours.single_pass and ours.schedule is not None and theirs.schedule is not None
        assert ours.param_groups[0]["steps_taken"] == theirs.param_groups[0]["steps_taken"]
        for a, b in zip(ours.schedule[:2], theirs.schedule[:2], strict=True):
            assert abs(a - b) <= near * abs(theirs.schedule.sigma)
        assert ours.update_statistics[4] == sum(p.numel() for group in ours.param_groups for p in group["params"])
        torch.testing.assert_close(ours.update_statistics, theirs.update_statistics, rtol=near, atol=0.0)


def check_softsignums_single_pass_is_the_separate_passes_to_the_bit() -> None:
    """Without clipping: then the host multiplies by nothing, in fp16 by a power of two. With overflows there, at the
    step before the soft phase and in it. The scale doubles after 3 good steps and halves after a bad one."""
    since(19, "distributed optimizer with one state tensor")
    for dtype, sharded in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        compared(*both(dtype=dtype, sharded=sharded, clip_grad=0.0), near=0.0)
    setting = {"dtype": torch.float16, "clip_grad": 0.0, **MOVING_SCALE}
    compared(*both(**setting), near=0.0, broken={9: float("inf"), 15: float("nan")}, steps=TWENTY + 2)


def check_softsignums_single_pass_clips() -> None:
    """On 4 of 5 steps (the norm is about 41 times 0.01 to 100)."""
    since(19, "distributed optimizer with one state tensor")
    for dtype, sharded in ((torch.bfloat16, True), (torch.float32, False)):
        compared(*both(dtype=dtype, sharded=sharded, clip_grad=1.0), near=NEAR)
    setting = {"dtype": torch.float16, "clip_grad": 1.0, **MOVING_SCALE}
    compared(*both(**setting), near=NEAR, broken={12: float("inf")}, steps=TWENTY + 1)


def check_softsignums_single_pass_is_taken() -> None:
    """The host's passes are not called, in a chain of two optimizers neither, whose steps are hard."""
    since(19, "distributed optimizer with one state tensor")
    for own in ({}, {"net": Experts(), "softsignum_soft_start": 1.0}):
        setting = {**SOFT, "dtype": torch.float16, "clip_grad": 1.0, **MOVING_SCALE, **own}
        with counted() as counts:
            run = Run(**setting)
            assert len(run.optimizer.chained_optimizers) == 1 + bool(own)
            assert run.step(gradients(run.net, 4))
        assert counts == {"unscale": 0, "clip": 0, "copy": 0}, counts
