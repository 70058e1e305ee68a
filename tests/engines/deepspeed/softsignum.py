"""Runs on ranks, from worker.py: SoftSignum under DeepSpeed's ZeRO 1 and 2, in both phases."""

from typing import Any

from s3_megatron.engines.deepspeed import activity
from s3_megatron.optim import SoftMuon, SoftSignum, registry
from tests.checks import refuses, shared_folder
from tests.engines.deepspeed import harness as on
from tests.engines.deepspeed.checkpoints import load, save
from tests.engines.deepspeed.window import OLD

STEPS, HARD = 8, 4
PARAMS = {"total_steps": STEPS, "soft_start": 0.5}


def started(stage: int = 1, precision: str = "fp32", params: dict[str, Any] = PARAMS, **settings: Any) -> on.Run:
    registry.add(registry.SOFTSIGNUM)
    run = on.Run(stage, precision, optimizer="SoftSignum", params=params, **settings)
    assert type(run.engine.basic_optimizer) is SoftSignum
    return run


def numbers(run: on.Run) -> tuple[Any, ...]:
    inner = run.engine.basic_optimizer
    return inner.schedule, inner.tau, *(group["steps_taken"] for group in inner.param_groups)


def check_softsignum_trains_and_resumes() -> None:
    """As the unsharded run, with weight decay and three groups; saved in either phase, it goes on to the bit.

    ZeRO 1 and 2 step one group at a time: each would have had a temperature of its own. Partitions are padded: each
    zero would have counted. The temperatures are equal to the bit.
    """
    for stage in (1, 2):
        run, resumed, reference = started(stage), [], on.Reference(SoftSignum, **PARAMS)
        for step in range(STEPS):
            if step in (2, HARD + 1, HARD + 2):
                save(run, folder := shared_folder())
                resumed.append(started(stage))
                load(resumed[-1], folder)
            assert all(each.step(on.gradients(step)) for each in (run, *resumed))
            reference.step(on.gradients(step))
            assert numbers(run)[1] == reference.optimizer.tau, step
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
        run = started(precision="fp16", fp16={"initial_scale_power": 4, "hysteresis": 1})
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


def check_softsignum_refuses_what_has_no_temperature_yet() -> None:
    for stage, settings in ((3, {}), (0, {}), (1, {"precision": "bf16", **on.FLOAT32_ACCUMULATION})):
        refuses(lambda s=stage, more=settings: started(s, **more), "ZeRO 1 and 2 alone")
    refuses(lambda: started(params={"soft_start": 0.5}), "the length of the run is not known")
    refuses(lambda: started(params={**PARAMS, "process_group": "all"}), "process_group")
    client = SoftSignum(on.groups(net := on.Net()), lr=on.LR, weight_decay=on.DECAY, **PARAMS)
    refuses(lambda: on.Run(3, client=client, net=net), "ZeRO 1 and 2 alone")
    muon = SoftMuon([(net := on.Net()).linear], weight_decay=on.DECAY, **PARAMS)
    refuses(lambda: on.Run(1, client=muon, net=net), "SoftMuon takes whole matrices")
