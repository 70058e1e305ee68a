"""Runs on ranks: the checks of test_engine.py that need several ranks and the real DeepSpeed.

A check is a function whose name starts with ``check_``, and one test there; tests/rank_checks.py runs them.
"""

import functools
import gc
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from s3_megatron.engines.deepspeed import activity, register, unregister, use_gloo
from s3_megatron.engines.deepspeed.layout import masters
from s3_megatron.engines.deepspeed.watch import part
from s3_megatron.optim.settings import _warn_of_ignored
from tests import rank_checks
from tests.engines.deepspeed import checkpoints, experts, features, limits, softmuon, softsignum, toy
from tests.engines.deepspeed.harness import (
    ALONE,
    FLOAT32_ACCUMULATION,
    STATES,
    STEPS_SHORT,
    Net,
    Reference,
    Run,
    compare,
    equal,
    float16_allowed,
    gradients,
    groups,
    logged,
    same,
)
from tests.engines.deepspeed.window import OLD, ZERO_OF_16_BIT
from tests.rank_checks import refuses


def check_float32_at_every_stage_equals_the_unsharded_run() -> None:
    for stage in (0, 1, 2, 3):
        compare(Run(stage))


def check_bfloat16_at_every_stage_equals_float32_masters() -> None:
    """Stage 0 (FP16_UnfusedOptimizer) steps once before training, with zero gradients, which decayed the weights."""
    for stage in ZERO_OF_16_BIT:
        compare(Run(stage, "bf16"))


def check_bfloat16_with_float32_accumulation() -> None:
    if not OLD:
        run = Run(1, "bf16", accumulate=2, **FLOAT32_ACCUMULATION)
        assert type(run.wrapper).__name__ == "BF16_Optimizer"
        compare(run)
    for stage in (3,) if OLD else (2, 3):
        compare(Run(stage, "bf16", accumulate=2, **FLOAT32_ACCUMULATION))


def check_clipping_equals_the_unsharded_run() -> None:
    for stage in (0, 1, 2, 3):
        compare(Run(stage, clip=0.5), clip=0.5)
    # The norm is summed in the gradients' bfloat16 at stage 0 alone.
    for stage in (1, 2, 3):
        compare(Run(stage, "bf16", clip=0.5), clip=0.5, tolerance=1e-5)


def check_accumulation_overlap_and_layout_options() -> None:
    for stage in (1, 2, 3):
        accumulate = 1 if OLD and stage == 2 else 2
        options = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 500}
        compare(Run(stage, accumulate=accumulate, zero=options))
        options = {"overlap_comm": False, "contiguous_gradients": False}
        compare(Run(stage, accumulate=accumulate, zero=options))
    for stage in (1, 2):
        compare(Run(stage, zero={"round_robin_gradients": True}))
    compare(Run(3, zero={"sub_group_size": 400}))  # step() is called once a sub-group


def check_a_parameter_without_elements() -> None:
    """ZeRO-3 fails on one by itself, with AdamW too (deepspeed 0.19.8); all of ZeRO did in 0.17.6."""
    for stage in (0,) if OLD else (0, 1, 2):
        run = Run(stage, net=Net(empty=True))
        grads = gradients(0, run.net)
        assert run.step(grads)
        reference = Reference()
        reference.step({name: grads[name] for name, _ in reference.net.named_parameters()})
        same(run, reference)


def check_float16_unscales_and_skips_an_overflow() -> None:
    """With a dynamic loss scale that starts too high for the first gradients: nothing moves until it has come down."""
    small = {name: grad.clamp(-1, 1) for name, grad in gradients(2).items()}
    huge = {name: grad + 30000.0 for name, grad in small.items()}
    with float16_allowed():
        for stage in (1, 2, 3):
            run = Run(stage, "fp16", fp16={"initial_scale_power": 12, "loss_scale_window": 2, "hysteresis": 1})
            before, scale = run.everything(), run.wrapper.loss_scale
            assert not run.step(huge)
            equal(run.everything(), before)
            assert activity(run.engine).steps == 0 and run.wrapper.loss_scale < scale
            reference, scales = Reference(), set()
            for _ in range(2 * STEPS_SHORT):  # the scale goes up every second step
                scales.add(run.wrapper.loss_scale)
                if run.step(small):
                    reference.step(small)
            assert len(scales) > 2
            # Gradients in float16, scaled by a power of two, lose 2^-11 of their value where they add up.
            same(run, reference, tolerance=1e-3)


def check_float16_at_stage_0_is_refused() -> None:
    """m came out 256 times too small at a loss scale of 256, with AdamW too: the loss had not been scaled."""
    with float16_allowed():
        refuses(lambda: Run(0, "fp16"), "stage 0", "use stage 1")


def check_a_nan_on_one_rank_skips_the_step_on_all() -> None:
    with float16_allowed():
        for stage in (1, 2, 3):
            for precision in ("fp32", "bf16", "fp16"):
                if OLD and (precision == "fp32" or (precision == "bf16" and stage == 3)):
                    continue  # 0.17.6 does not check there (limits.py), and in bfloat16 only where configured
                more = {"bf16": {"check_grad_overflow": True}} if OLD and precision == "bf16" else {}  # 0.19's default
                run = Run(stage, precision, **more)
                while not run.step(gradients(2)):  # until fp16's loss scale fits
                    pass
                before, steps = run.everything(), activity(run.engine).steps
                bad = gradients(2)
                if dist.get_rank() == 0:
                    bad["linear"][0, 0] = float("nan")
                assert not run.step(bad), f"{stage} {precision}"
                equal(run.everything(), before)
                assert activity(run.engine).steps == steps
                while not run.step(gradients(2)):  # fp16's scale may have grown in between
                    assert precision == "fp16", f"{stage}"


def check_state_is_partitioned_and_nothing_else_is_kept() -> None:
    """Each rank holds 1/dp of masters, m and r, rounded up to 2 x dp elements a group (ZeRO-3: one a parameter)."""
    ranks = dist.get_world_size()
    sizes = [[p.numel() for p in group["params"] if p.requires_grad] for group in groups(Net())]
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            run = Run(stage, precision)
            run.step(gradients(0))
            held = masters(run.wrapper)
            mine = [master.numel() for master in held]
            if stage == 3:
                assert mine == [sum(-(-n // ranks) for n in group) for group in sizes]
            else:
                assert mine == [-(-sum(group) // (2 * ranks)) * 2 for group in sizes]
            for master in held:
                state = {name: value for name, value in run.s3.state[master].items() if torch.is_tensor(value)}
                assert sorted(state) == sorted(STATES)
                assert all(s.shape == master.shape and s.dtype == torch.float32 for s in state.values())
            assert len(run.s3.state) == len(held)


def check_what_s3_cannot_do_is_refused() -> None:
    refuses(lambda: Run(1, params={"eps": 1e-8, "adam_w_mode": True}), "'adam_w_mode', 'eps'", "it has beta, impl")
    refuses(lambda: Run(1, params={"beta": 1.5}), "beta is 1.5")
    refuses(lambda: Run(1, params={"state_dtype": "float16"}), "'float16'", "'float32', 'bfloat16'")
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": "nowhere"}}
    refuses(lambda: Run(3, zero=nvme), "offload_optimizer", "nvme", "'cpu'")
    nvme = {"offload_param": {"device": "nvme", "nvme_path": "nowhere"}}
    refuses(lambda: Run(3, zero=nvme), "offload_param", "nvme", "'cpu'")
    refuses(lambda: Run(3, zero={"offload_optimizer": {"device": "cpu", "ratio": 0.3}}), "ratio 0.3", "AdamW")
    compare(Run(3, zero={"offload_optimizer": {"device": "cpu", "ratio": 1.0}}))  # as the line advises
    compare(Run(3, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}))  # and nvme's
    for stage in (2, 3):
        zenflow = {"offload_optimizer": {"device": "cpu"}, "zenflow": {"topk_ratio": 0.1}}
        refuses(lambda stage=stage, zero=zenflow: Run(stage, zero=zero), "has zenflow", "leave it out")
        del zenflow["zenflow"]
        compare(Run(stage, zero=zenflow))
    if not OLD:  # which does not have the key
        refuses(lambda: Run(3, zero={"offload_optimizer": {"device": "cpu", "super_offload": True}}), "super_offload")


def check_the_first_line_says_what_s3_holds() -> None:
    with logged() as lines:
        run = Run(2, "bf16", offload=True)
    (line,) = [line for line in lines if "S3 active" in line] or [""]
    if dist.get_rank() > 0:
        assert line == ""
        return
    held = sum(m.numel() for m in masters(run.wrapper))
    assert f"DeepSpeedZeroOptimizer (ZeRO 2): this rank updates {2 + ALONE} tensors" in line, line
    assert f"{held:,} of {sum(p.numel() for p in run.trained().values()):,} elements, on cpu with kernel" in line, line
    assert "masters in float32, m and s^(1/p) in float32; betas=(0.95, 0.95) p=3.0 nesterov=True" in line, line


def check_no_note_of_the_hosts_in_a_param_group_is_reported() -> None:
    """S3 names what it ignores in a group; ZeRO's own entries, of a load too, and ours are none of that."""
    for stage in (0, 1, 2, 3):
        run, folder = Run(stage), rank_checks.shared_folder()
        run.step(gradients(0))
        run.engine.save_checkpoint(str(folder), tag="saved")
        Run(stage).engine.load_checkpoint(str(folder), tag="saved")
    assert _warn_of_ignored.cache_info().currsize == 0, "nor by any check before"


def check_a_run_stops_when_something_else_steps() -> None:
    run = Run(1)
    run.wrapper.optimizer = torch.optim.AdamW(run.s3.param_groups)
    refuses(lambda: run.step(gradients(0)), "S3 moved 0 of", "another optimizer has taken its place")
    run = Run(3)
    run.s3.step = lambda: None
    refuses(lambda: run.step(gradients(0)), "S3 moved 0 of")
    other = Run(1, optimizer="AdamW", params={"torch_adam": True})
    refuses(lambda: activity(other.engine), "does not train with S3", "register()")


def check_statistics_of_a_step_are_of_all_groups() -> None:
    """ZeRO calls step once a group; of a first step every coordinate has |u| = (1 - beta^2)^(2/3), against its own
    gradient. The alignment padding has no gradient and no update."""
    for stage in (0, 1, 2, 3):
        run = Run(stage)
        seen = activity(run.engine)
        seen.watch()
        for _ in range(2):  # the second time after a wrong first: statistics must not add up over steps
            run.step(gradients(0))
        total, largest, _, agreeing, elements = seen.statistics.tolist()
        assert elements == seen.elements == sum(m.numel() for m in masters(run.wrapper))
        second = (1 - 0.95**3) ** (2 / 3)  # a constant gradient meets the bound
        assert abs(largest / second - 1) < 1e-6
        assert abs(total / agreeing / second - 1) < 1e-6 and agreeing <= elements


def check_adams_sizes_are_known_at_every_stage() -> None:
    """Of ZeRO-3 they were 0. A first update is g / (|g| + 1e-8), and padding has no gradient. In a loop of one's own a
    rank's partition was taken for the model: its state had 8 bytes a weight on any number of ranks."""
    for stage in (0, 1, 2, 3):
        run = Run(stage, optimizer="AdamW", params={"torch_adam": True})
        watched = part(run.engine)
        run.step(gradients(0))
        total, largest, _, _, elements = watched.statistics().tolist()
        assert elements == watched.elements == sum(m.numel() for m in masters(run.wrapper)), stage
        assert abs(largest - 1) < 1e-5 and 0.5 < total / elements <= 1, stage
        assert watched.model_elements == sum(p.numel() for p in Run(0).engine.module.parameters()), stage


def check_stock_adam_is_bit_identical_with_and_without_s3() -> None:
    def train(stage: int, precision: str, offload: bool) -> list[torch.Tensor]:
        run = Run(stage, precision, optimizer="AdamW", params={"torch_adam": True}, clip=0.5)
        for step in range(STEPS_SHORT):
            run.step(gradients(step))
        return [*run.model_weights().values()]

    cases: list[tuple[int, str, bool]] = [
        (0, "fp32", False),
        (1, "bf16", False),
        (2, "fp32", False),
        (3, "bf16", False),
    ]
    registered = [train(*case) for case in cases]
    unregister()
    try:
        for case, with_s3 in zip(cases, registered, strict=True):
            equal(train(*case), with_s3)
        try:
            Run(1)
        except AssertionError as error:
            assert "not a supported DeepSpeed Optimizer" in str(error)
        else:
            raise AssertionError("unregister() left S3 behind")
    finally:
        register()
        register()  # the second time does nothing
    compare(Run(1), steps=1)


def main(output: Path, folder: Path, names: list[str]) -> None:
    use_gloo()
    deepspeed.init_distributed("gloo", verbose=False)
    # DeepSpeed collects garbage for every engine: a quarter of a second, unless it passes over what was imported.
    gc.freeze()
    found = rank_checks.named(
        sys.modules[__name__], checkpoints, features, toy, softsignum, softmuon, experts, *([limits] if OLD else [])
    )
    names_of = (*vars(softsignum), *vars(softmuon))
    universal = {name: functools.partial(found[name], folder) for name in names_of if "check_universal" in name}
    rank_checks.run({**found, **checkpoints.checks(folder), **universal}, names, output)  # whose checks take the folder
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
