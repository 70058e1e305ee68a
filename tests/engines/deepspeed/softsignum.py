"""Runs on ranks, from worker.py: SoftSignum under DeepSpeed, in both phases."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s3_megatron.engines.deepspeed import activity
from s3_megatron.engines.deepspeed.watch import part
from s3_megatron.optim import EXP_AVG, SoftSignum
from tests.engines.deepspeed import harness as on
from tests.engines.deepspeed.checkpoints import convert, load, save, spoil
from tests.engines.deepspeed.window import OLD
from tests.rank_checks import refuses, shared_folder

STEPS, HARD = 8, 4
PARAMS = {"total_steps": STEPS, "soft_start": 0.5}
# Stage, precision, and what else makes a run: of every way in which DeepSpeed holds m.
KINDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage0": (0, "fp32", {}),
    "stage1": (1, "fp32", {}),
    "stage2": (2, "fp32", {}),
    "stage3": (3, "fp32", {"zero": {"sub_group_size": 400}}),
    "stage3-bf16-offload": (3, "bf16", {"offload": True}),
    **({} if OLD else {"stage0-bf16": (0, "bf16", {}), "stage1-bf16": (1, "bf16", on.FLOAT32_ACCUMULATION)}),
}
# DeepSpeed's converter fails on a group of BF16_Optimizer that is smaller than its padding, and 0.17.6's on ZeRO-3.
UNIVERSAL = {name: {"alone": False} if name == "stage1-bf16" else {} for name in KINDS if "stage0" not in name}


def started(stage: int = 1, precision: str = "fp32", params: dict[str, Any] = PARAMS, **settings: Any) -> on.Run:
    run = on.Run(stage, precision, optimizer="SoftSignum", params=params, **settings)
    assert type(run.engine.basic_optimizer) is SoftSignum
    assert run.engine.basic_optimizer.level_of_begin == logging.WARNING
    return run


def numbers(run: on.Run) -> tuple[Any, ...]:
    inner = run.engine.basic_optimizer
    return inner.schedule, inner.tau, *(group["steps_taken"] for group in inner.param_groups)


def check_softsignum_trains_and_resumes() -> None:
    """As the unsharded run, with weight decay and three groups; saved in either phase, it goes on to the bit.

    ZeRO steps one group, or sub-group, at a time: each would have had a temperature of its own. Partitions are padded:
    each zero would have counted. ZeRO-3's groups are empty between its steps. The temperatures are equal to the bit.
    """
    for name, (stage, precision, settings) in KINDS.items():
        run, resumed = started(stage, precision, **settings), []
        reference = on.Reference(SoftSignum, **PARAMS)
        for step in range(STEPS):
            if step in (2, HARD + 1, HARD + 2):
                save(run, folder := shared_folder())
                resumed.append(started(stage, precision, **settings))
                load(resumed[-1], folder)
            assert all(each.step(on.gradients(step)) for each in (run, *resumed))
            reference.step(on.gradients(step))
            assert numbers(run)[1] == reference.optimizer.tau, f"{name} {step}"
        assert numbers(run)[0] == reference.optimizer.schedule and activity(run.engine).steps == STEPS
        assert (numbers(run)[0].first, numbers(run)[0].length) == (HARD, STEPS - HARD)
        for other in resumed:
            on.equal(other.everything(), run.everything())
            assert numbers(other) == numbers(run)
        # 8 ULP of float32, of the weight or of the longest step.
        on.close(run.weights(), reference.weights(), rtol=1e-6, atol=1e-6 * on.LR)


def check_softsignum_skips_an_overflow_and_its_schedule_does_not_advance() -> None:
    """At the step that would begin the soft phase, and in it."""
    small = {name: grad.clamp(-1, 1) for name, grad in on.gradients(2).items()}
    huge = {name: grad * 1e5 for name, grad in small.items()}
    with on.float16_allowed():
        for stage in (1, 3):
            run = started(stage, "fp16", fp16={"initial_scale_power": 4, "hysteresis": 1})
            for step in range(STEPS):
                if step in (HARD, HARD + 1):
                    before, found = run.everything(), numbers(run)
                    assert not run.step(huge)
                    on.equal(run.everything(), before)
                    assert numbers(run) == found
                assert run.step(small)
            assert {*numbers(run)[2:]} == {STEPS} and numbers(run)[0].first == HARD


def check_softsignum_counts_no_padding_and_every_step() -> None:
    """With padding between parameters, under offload, and in bfloat16; the first step at rate 0 is one of the run."""
    aligned = [] if OLD else [{"zero": {"parameter_alignment": True}}]
    for settings in (*aligned, {"offload": True}, {"stage": 2, "precision": "bf16"}):
        run, reference = started(**settings), on.Reference(SoftSignum, **PARAMS)
        for step in range(STEPS):
            for group in run.engine.basic_optimizer.param_groups:
                group["lr"] = on.LR * min(step, 1)
            reference.optimizer.param_groups[0]["lr"] = on.LR * max(min(step, 1), 1e-30)
            assert run.step(on.gradients(step))
            reference.step(on.gradients(step))
        assert numbers(run)[0] == reference.optimizer.schedule, settings
        assert {*numbers(run)[2:]} == {STEPS}


def check_universal_checkpoints_of_softsignum(folder: Path) -> None:
    """From 2 ranks to 2, 1 and 4, of either phase: masters and m to the bit, the same temperatures and training after.

    DeepSpeed's converter takes both of Adam's states of every optimizer: KeyError 'exp_avg_sq'.
    """
    for name, groups in UNIVERSAL.items():
        stage, precision, settings = KINDS[name]
        if OLD and stage == 3:
            continue
        for phase, saved_at in (("hard", 2), ("soft", HARD + 2)):
            place = folder / f"softsignum-{name}-{phase}"
            if dist.get_world_size() == 2:
                run = started(stage, precision, **settings, **groups)
                for step in range(saved_at):
                    run.step(on.gradients(step))
                save(run, place)
                whole = {"weights": run.weights(), "m": run.state(EXP_AVG)}
                if dist.get_rank() == 0:
                    convert(place)
                    torch.save(whole, place / "whole.pt")
                dist.barrier()
            run = started(stage, precision, checkpoint={"load_universal": True}, **settings, **groups)
            run.step(on.gradients(7))
            spoil(run.net)
            load(run, place / "universal")
            whole = torch.load(place / "whole.pt", weights_only=True)
            on.close(run.weights(), whole["weights"], rtol=0.0, atol=0.0)
            on.close(run.state(EXP_AVG), whole["m"], rtol=0.0, atol=0.0)
            held = run.engine.basic_optimizer.state.values()
            assert {key for state in held for key in state} == {EXP_AVG, *(["step"] if stage == 3 else [])}
            reference = on.Reference(SoftSignum, **groups, **PARAMS)
            for step in range(STEPS):
                reference.step(on.gradients(step))
                if step >= saved_at:
                    assert run.step(on.gradients(step))
                    assert numbers(run)[1] == reference.optimizer.tau, f"{name} {phase} {step}"
            on.close(run.weights(), reference.weights(), rtol=1e-6, atol=1e-6 * on.LR)
            # A longer run: in the hard phase its own plan counts, in the soft one the schedule that has begun.
            run = started(
                stage,
                precision,
                params={"total_steps": 12, "soft_start": 0.5},
                checkpoint={"load_universal": True},
                **settings,
                **groups,
            )
            load(run, place / "universal")
            group = run.engine.basic_optimizer.param_groups[-1]
            assert (group["sign_iters"], group["transition_iters"]) == ((6, 6) if phase == "hard" else (4, 4))


def check_softsignum_is_watched() -> None:
    """Hard steps move every weight with an m by 1; padding has none. Soft ones move less."""
    for stage, precision, settings in KINDS.values():
        run = started(stage, precision, **settings)
        watched = part(run.engine)
        seen = []
        for step in range(STEPS):
            run.step(on.gradients(step))
            seen.append(watched.statistics().tolist())
        weights = sum(p.numel() for p in run.trained().values())
        total, largest, saturated, _, elements = seen[0]
        found = torch.tensor([total, saturated])
        if stage:
            dist.all_reduce(found)
        assert elements == watched.elements and found.tolist() == [weights, weights] and largest == 1
        assert seen[-1][0] < seen[0][0] and seen[-1][1] <= 1


def check_softsignum_takes_its_length_from_the_scheduler() -> None:
    """Only where the params have none: the Trainer fills in the scheduler's "auto", and knows no param of ours."""
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_num_steps": 1}}
    for params, hard, soft in (({"soft_start": 0.5}, 5, 5), (PARAMS, HARD, STEPS - HARD)):
        groups = started(params=params, scheduler=scheduler).engine.basic_optimizer.param_groups
        assert {(group["sign_iters"], group["transition_iters"]) for group in groups} == {(hard, soft)}


def check_softsignum_refuses_what_has_no_temperature() -> None:
    refuses(lambda: started(params={"soft_start": 0.5}), "the length of the run is not known")
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 1}}  # of no Trainer
    refuses(lambda: started(params={"soft_start": 0.5}, scheduler=scheduler), "the length of the run is not known")
    refuses(lambda: started(params={**PARAMS, "process_group": "all"}), "process_group")
    for name, value, line in (
        ("soft_start", 1.5, "soft_start is 1.5: it must lie in [0, 1]"),
        ("soft_start", "0.5", "soft_start is '0.5': it must be a number"),
        ("total_steps", 8.5, "total_steps is 8.5: it must be a whole number >= 1"),
        ("total_steps", "8", "total_steps is '8': it must be a number"),
        ("transition_iters", 0, "transition_iters is 0: it must be a whole number >= 1"),
        ("sign_iters", -1, "sign_iters is -1: it must be a whole number >= 0"),
    ):
        refuses(lambda n=name, v=value: started(params={**PARAMS, n: v}), line)
    adam, folder = on.Run(1, optimizer="AdamW", params={"torch_adam": True}), shared_folder()
    adam.step(on.gradients(0))
    save(adam, folder)
    refuses(lambda: load(started(), folder), "was not written by SoftSignum", "load_module_only=True")
    refuses(lambda: started(params={**PARAMS, "softsignum_from_adam": True}), "softsignum_from_adam")
