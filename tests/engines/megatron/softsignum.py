"""Runs on ranks, from worker.py: SoftSignum on Megatron's optimizers, in both phases."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.optimizer import DistributedOptimizer, OptimizerConfig
from torch import Tensor

from s3_megatron.engines.megatron import SoftSignumOptimizerConfig
from s3_megatron.optim import EXP_AVG, SoftSignum
from s3_megatron.optim.pooled_median import median_and_deviation
from tests.engines.megatron import harness as on
from tests.rank_checks import refuses, shared_folder

STEPS, HARD = 8, 4
LENGTH = {"total_steps": STEPS, "soft_start": 0.5}


def started(*extra: str, steps: int = STEPS, soft_start: str = "0.5", sharded: bool = on.TAKES_ONE_STATE, **run: Any):
    given = ("--softsignum-soft-start", soft_start, *extra)
    return on.by_flags("softsignum", *given, iterations=steps, sharded=sharded, **run)


def inner(run: on.Run) -> SoftSignum:
    assert type(run.part.optimizer) is SoftSignum
    return run.part.optimizer


def everything(run: on.Run) -> tuple[list[Tensor], tuple[Any, ...]]:
    groups = inner(run).param_groups
    return [*run.inner_tensors(), *run.weights().values()], (
        inner(run).schedule,
        inner(run).tau,
        *taken(run),
        groups[0]["lr"],
    )


def taken(run: on.Run) -> tuple[int, ...]:
    return tuple(group["steps_taken"] for group in inner(run).param_groups)


def check_softsignum_trains_and_resumes() -> None:
    """As the unsharded run; saved in either phase, the run that goes on is the uninterrupted one to the bit.

    With weight decay. The temperatures are equal to the bit, too: what is summed up over ranks is whole numbers.
    """
    for kind in (*(("dp_reshardable", "fully_reshardable") if on.TAKES_ONE_STATE else ()), "unsharded"):
        sharded = kind != "unsharded"
        run, resumed = started(sharded=sharded), []
        reference, copies = on.unsharded(run, SoftSignum, **LENGTH)
        for step in range(STEPS):
            if step in (2, HARD, HARD + 1, HARD + 2):
                on.save(run, folder := shared_folder(), kind)
                resumed.append(started(sharded=sharded))
                resumed[-1].net.load_state_dict(run.net.state_dict())
                on.load(resumed[-1], folder, kind)
                on.set_decay(resumed[-1])
            assert all(each.step(on.gradients(run.net, step)) for each in (run, *resumed))
            on.step_reference(reference, copies, on.gradients(run.net, step))
            assert inner(run).tau == reference.tau, step
        tensors, numbers = everything(run)
        assert numbers[0] == reference.schedule and (numbers[0].first, numbers[0].length) == (HARD, STEPS - HARD)
        for other in resumed:
            theirs, found = everything(other)
            assert found == numbers
            assert all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True)), kind
        for name, weight in run.weights().items():  # 8 ULP of float32, of the weight or of the longest step
            torch.testing.assert_close(weight, copies[name].data, rtol=1e-6, atol=1e-6 * on.LR)


def check_softsignum_under_context_parallelism_equals_the_unsharded_run() -> None:
    """Context-parallel ranks have the same weights, as data-parallel ones have: shards are of both, or all have all and
    one counts."""
    with on.parallel(context=2):
        for sharded in on.WRAPPERS:
            run = started(sharded=sharded)
            reference, copies = on.unsharded(run, SoftSignum, **LENGTH)
            for step in range(STEPS):
                assert run.step(on.gradients(run.net, step))
                on.step_reference(reference, copies, on.gradients(run.net, step))
                assert inner(run).tau == reference.tau, step
            assert inner(run).schedule == reference.schedule and reference.schedule.first == HARD
            for name, weight in run.weights().items():
                torch.testing.assert_close(weight, copies[name].data, rtol=1e-6, atol=1e-6 * on.LR)


def check_softsignum_goes_by_the_length_that_the_run_has_now() -> None:
    """Saved at step 2 of 8, resumed as one of 12: soft from step 6. In the soft phase the schedule goes on; other
    hyperparameters of the state are refused."""
    run = started()
    for step in range(HARD + 2):
        if step == 2:
            on.save(run, hard := shared_folder(), "fully_reshardable")
        run.step(on.gradients(run.net, step))
    on.save(run, soft := shared_folder(), "fully_reshardable")
    longer = started(steps=12)
    on.load(longer, hard, "fully_reshardable")
    assert all((group["sign_iters"], group["steps_taken"]) == (6, 2) for group in inner(longer).param_groups)
    on.load(longer := started(steps=12), soft, "fully_reshardable")
    assert (inner(longer).schedule, inner(longer).tau) == (inner(run).schedule, inner(run).tau)
    for other in (("--softsignum-beta", "0.8"), ("--softsignum-nesterov",)):
        refuses(
            lambda o=other: on.load(started(*o), soft, "fully_reshardable"), "--softsignum-override-hyperparameters"
        )
    on.load(started("--softsignum-beta", "0.8", "--softsignum-override-hyperparameters"), soft, "fully_reshardable")


def check_softsignums_bad_flags_are_refused() -> None:
    for bad, message in (
        (("--softsignum-eps", "0"), "--softsignum-eps is 0.0"),
        (("--softsignum-tmax", "0.5"), "--softsignum-tmax is 0.5"),
        (("--softsignum-transition-iters", "3"), "transition_iters is 3 without sign_iters"),
        (("--softsignum-sign-iters", "8"), "no soft step is left"),
        (("--softsignum-total-steps", "0"), "--softsignum-total-steps is 0: it must be a whole number >= 1"),
    ):
        refuses(lambda b=bad: started(*b), message)
    refuses(lambda: started(soft_start="1.5"), "--softsignum-soft-start is 1.5: it must lie in [0, 1]")


def check_softsignum_by_its_configuration_and_not_from_adam() -> None:
    """As Megatron-Bridge builds it; the configuration of an optimizer does not know the length of a run."""

    sharded = on.TAKES_ONE_STATE

    def provided(**own: Any) -> on.Run:
        settings = {"lr": on.LR, "weight_decay": on.DECAY, "clip_grad": 0.0, **own}
        config = SoftSignumOptimizerConfig(use_distributed_optimizer=sharded, **settings)
        config.finalize()
        provide = config.provide
        run = on.Run(make=lambda _, chunks, overrides: provide(chunks, config_overrides=overrides), sharded=sharded)
        on.set_decay(run)
        return run

    refuses(provided, "the length of the run is not known")
    plain = OptimizerConfig(optimizer="softsignum", lr=on.LR, use_distributed_optimizer=True)
    refuses(lambda: on.get_megatron_optimizer(plain, [on.Run().ddp]), "SoftSignumOptimizerConfig")
    run, flagged = provided(softsignum_total_steps=STEPS, softsignum_soft_start=0.5), started()
    for step in range(STEPS):
        assert run.step(on.gradients(run.net, step)) and flagged.step(on.gradients(run.net, step))
    assert all(torch.equal(a, b) for a, b in zip(run.inner_tensors(), flagged.inner_tensors(), strict=True))
    assert inner(run).schedule == inner(flagged).schedule
    adam, folder = on.Run(optimizer="adam", sharded=sharded), shared_folder()
    adam.step(on.gradients(adam.net, 0))
    on.save(adam, folder, "fully_reshardable")
    refuses(lambda: on.load(run, folder, "fully_reshardable"), "was not written by SoftSignum: pass --no-load-optim")


def check_softsignum_skips_an_overflow_and_its_schedule_does_not_advance() -> None:
    """In fp16, an inf on one rank, at the step that would begin the soft phase, and in it; without the distributed
    optimizer, too."""
    scale = ("--initial-loss-scale", "1024", "--hysteresis", "1")
    for sharded in on.WRAPPERS:
        run = started(*scale, precision="fp16", dtype=torch.float16, sharded=sharded)
        for step in range(STEPS):
            if step in (HARD, HARD + 1):
                before, numbers = everything(run)
                bad = on.gradients(run.net, 2)
                if dist.get_rank() == 0:
                    bad["linear.weight"][3, 4] = float("inf")
                assert not run.step(bad)
                after, found = everything(run)
                assert found == numbers and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert run.step(on.gradients(run.net, 2))
        assert {*taken(run)} == {STEPS} and inner(run).schedule.first == HARD


def check_softsignum_counts_a_step_at_rate_0_and_ranks_that_hold_nothing() -> None:
    """A warm-up of Megatron's begins at rate 0, and the run would have had one soft step less than configured."""
    run = started(net=on.Single())
    for step in range(STEPS):
        for group in inner(run).param_groups:
            group["lr"] = on.LR * min(step, 1)
        assert run.step(on.gradients(run.net, step))
    assert {*taken(run)} == {STEPS} and inner(run).schedule.first == HARD and inner(run).schedule.mu != 0
    schedules = [None] * dist.get_world_size()
    dist.all_gather_object(schedules, inner(run).schedule)
    assert len({*schedules}) == 1


def check_softsignum_counts_what_tensor_parallel_ranks_share_once() -> None:
    """The linear's weight is another one on every tensor-parallel rank, the rest is on all of them; all ranks are
    tensor-parallel. And one weight is marked as the copy that another pipeline stage has."""
    on.since(19, "distributed optimizer with one state tensor")
    with on.parallel(dist.get_world_size()):
        net = on.Net()
        for name, param in net.named_parameters():
            param.tensor_model_parallel, param.partition_dim, param.partition_stride = name == "linear.weight", 0, 1
            param.shared = name == "embedding.weight"
        run = started(net=net)
        for step in range(HARD + 1):
            grads = on.gradients(run.net, step)
            grads["linear.weight"] *= 1 + dist.get_rank()
            assert run.step(grads)
        mine = {}
        names = {param: name for name, param in net.named_parameters()}
        for model, main in zip(
            [p for group in run.part.model_fp32_groups for p in group],
            [p for group in run.part.shard_fp32_groups for p in group],
            strict=True,
        ):
            mine[names[model]] = inner(run).state[main][EXP_AVG].clone()
        everywhere: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        rest = [m for name, m in mine.items() if name not in ("linear.weight", "embedding.weight")]
        expected = median_and_deviation([*(each["linear.weight"] for each in everywhere), *rest])
        assert len(rest) == 4 and inner(run).schedule[:2] == expected


def check_softsignum_needs_a_distributed_optimizer_that_takes_one_state() -> None:
    """0.17's and 0.18's save both of Adam's states of every optimizer; here 0.19 with that part of it taken away. By
    flags it is refused before a model is built: it was after that."""
    keys = vars(DistributedOptimizer).get("optimizer_state_keys")
    try:
        if keys is not None:
            del DistributedOptimizer.optimizer_state_keys
        message = "install 0.19", "without --use-distributed-optimizer"
        with patch.object(on, "Run", side_effect=AssertionError("a model is built")):
            refuses(lambda: started(sharded=True), *message)
        length = {f"softsignum_{name}": value for name, value in LENGTH.items()}
        refuses(lambda: on.Run(optimizer="softsignum", **length), *message)
    finally:
        if keys is not None:
            DistributedOptimizer.optimizer_state_keys = keys
