"""Runs on ranks: the checks of test_engine.py that need several ranks and the real megatron-core.

A check is a function whose name starts with ``check_``, and one test there; tests/rank_checks.py runs them.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

# isort: split  (the harness turns the rehearsal on, which has to come before Megatron is imported)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import (
    DistributedOptimizer,
    FP32Optimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    distrib_optimizer,
    get_standard_config_overrides,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from s3_megatron.engines.megatron import S3OptimizerConfig, install, uninstall
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3
from tests import rank_checks
from tests.engines.megatron import (
    experts,
    passes,
    resumes,
    soft_passes,
    softmuon,
    softmuon_experts,
    softsignum,
    toy,
    watching,
)
from tests.engines.megatron.harness import (
    LR,
    Run,
    Single,
    compare,
    get_megatron_optimizer,
    gradients,
    load,
    save,
)
from tests.rank_checks import refuses, shared_folder


def check_float32_shards_equal_the_unsharded_run() -> None:
    run = Run()
    assert isinstance(run.part, DistributedOptimizer) and type(run.part.optimizer) is S3
    compare(run)


def check_several_buckets_equal_the_unsharded_run() -> None:
    """Megatron-LM PR 5077 wrote zeros past the first bucket, which one-bucket tests did not see."""
    run = Run(bucket_size=300)
    assert sum(len(buffer.buckets) for buffer in run.ddp.buffers) >= 3
    compare(run)


def check_bfloat16_masters_equal_the_unsharded_run() -> None:
    compare(Run(dtype=torch.bfloat16))


def check_clipping_equals_the_unsharded_run() -> None:
    compare(Run(clip_grad=0.5), clip=0.5)


def check_fp32_optimizer_equals_the_unsharded_run() -> None:
    run = Run(sharded=False)
    assert isinstance(run.part, FP32Optimizer)
    compare(run)


def check_float16_optimizer_equals_the_unsharded_run() -> None:
    run = Run(sharded=False, dtype=torch.bfloat16)
    assert type(run.part).__name__ == "Float16OptimizerWithFloat16Params"
    compare(run)


def check_state_is_partitioned() -> None:
    """m, r and float32 masters hold 1/dp of the elements, each element once, uneven shards included."""
    run = Run(dtype=torch.bfloat16)
    run.step(gradients(run.net, 0))
    elements = sum(p.numel() for p in run.net.parameters())
    inner = run.part.optimizer
    held = [p for group in inner.param_groups for p in group["params"]]
    mine = sum(p.numel() for p in held)
    for param in held:
        assert param.dtype == torch.float32
        assert inner.state[param][EXP_AVG].numel() == inner.state[param][EXP_AVG_ROOT].numel() == param.numel()
        assert set(inner.state[param]) == {EXP_AVG, EXP_AVG_ROOT, "step"}, "nothing else is kept per parameter"
    assert sum(state[EXP_AVG].numel() for state in inner.state.values()) == mine, "no state for what is not held"
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, mine)
    assert sum(counts) == elements, f"{counts} do not add up to {elements}"
    padded = run.ddp.buffers[0].numel // dist.get_world_size()
    assert max(counts) <= padded and len(set(counts)) > 1, f"{counts} of {padded}: uneven shards were wanted"


def check_a_rank_with_an_empty_shard_takes_part() -> None:
    run = Run(net=Single())
    mine = sum(p.numel() for group in run.part.param_groups for p in group["params"])
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, mine)
    assert counts == [1] + [0] * (len(counts) - 1)
    compare(run)


def check_overrides_reach_s3s_groups() -> None:
    """A decoupled rate for the embedding and Megatron's no-decay groups arrive in S3's param groups."""
    overrides = {ParamKey(attr="is_embedding_or_output_parameter"): {"max_lr": 0.5, "min_lr": 0.1}}
    run = Run(overrides=overrides)
    assert sorted({group["max_lr"] for group in run.optimizer.param_groups}) == [LR, 0.5]
    run = Run()
    assert {group["wd_mult"] for group in run.optimizer.param_groups} == {0.0, 1.0}
    assert all(group["betas"] == (0.95, 0.95) and group["p"] == 3.0 for group in run.optimizer.param_groups)


def check_fp16_overflow_is_skipped() -> None:
    """An inf or NaN on one rank only: every rank skips, the scale falls, weights and state keep every bit."""
    for value in (float("inf"), float("nan")):
        run = Run(
            dtype=torch.float16,
            initial_loss_scale=1024.0,
            min_loss_scale=1.0,
            loss_scale_window=100,
            hysteresis=1,
        )
        assert run.step(gradients(run.net, 2))
        before, tensors = run.weights(), run.inner_tensors()
        bad = gradients(run.net, 2)
        if dist.get_rank() == 0:
            bad["linear.weight"][3, 4] = value
        assert not run.step(bad)
        assert run.optimizer.get_loss_scale().item() == 512.0
        assert all(torch.equal(a, b) for a, b in zip(tensors, run.inner_tensors(), strict=True))
        assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())
        assert run.step(gradients(run.net, 2)), "training goes on"


def check_save_and_load_in_the_middle_changes_no_bit() -> None:
    """Both sharding types that megatron-core 0.17.1 to 0.19.2 write, and the two unsharded optimizers."""
    cases = [(True, kind) for kind in ("dp_reshardable", "fully_reshardable")]
    for sharded, kind in [*cases, (False, "none")]:
        for dtype in (torch.float32, torch.bfloat16):
            first = Run(dtype=dtype, sharded=sharded)
            for step in range(3):
                first.step(gradients(first.net, step))
            folder = shared_folder()
            save(first, folder, kind)
            second = Run(dtype=dtype, sharded=sharded)
            second.net.load_state_dict(first.net.state_dict())
            load(second, folder, kind)
            for step in range(3, 6):
                first.step(gradients(first.net, step))
                second.step(gradients(second.net, step))
            for a, b in zip(first.inner_tensors(), second.inner_tensors(), strict=True):
                assert torch.equal(a, b), f"{kind} {dtype}"
            assert all(torch.equal(first.weights()[n], w) for n, w in second.weights().items()), f"{kind} {dtype}"


def check_transformer_engine_or_apex_present() -> None:
    """With TE or Apex importable the host keeps no per-parameter `step` (its probe is faked: neither runs on CPU)."""
    flags = {"HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True}
    saved = {name: getattr(distrib_optimizer, name) for name in flags}
    for name, value in flags.items():
        setattr(distrib_optimizer, name, value)
    try:
        run = Run()
        run.step(gradients(run.net, 0))
        assert all(set(state) == {EXP_AVG, EXP_AVG_ROOT} for state in run.part.optimizer.state.values())
        folder = shared_folder()
        save(run, folder, "fully_reshardable")
        other = Run()
        load(other, folder, "fully_reshardable")
        for a, b in zip(run.inner_tensors(), other.inner_tensors(), strict=True):
            assert torch.equal(a, b)
        compare(Run())
        bare, folder = Run(net=Single()), shared_folder()
        save(bare, folder, "dp_reshardable")  # on ranks that hold nothing, too
        load(bare, folder, "dp_reshardable")
    finally:
        for name, value in saved.items():
            setattr(distrib_optimizer, name, value)


def check_adams_checkpoint_is_refused_or_converted() -> None:
    for sharded in (True, False):
        _from_adam_to_s3(sharded)


def _from_adam_to_s3(sharded: bool) -> None:
    """m as is, r = sqrt(v), under another peak rate, in sharded and unsharded optimizers."""
    adam = Run(optimizer="adam", sharded=sharded, lr=LR / 10)
    for step in range(3):
        adam.step(gradients(adam.net, step))
    folder = shared_folder()
    save(adam, folder, "fully_reshardable")
    refuses(lambda: load(Run(sharded=sharded), folder, "fully_reshardable"), "--s3-from-adam")
    s3 = Run(s3_from_adam=True, sharded=sharded)
    load(s3, folder, "fully_reshardable")
    old, new = adam.part.optimizer, s3.part.optimizer
    pairs = [
        (old.state[a], new.state[b])
        for ga, gb in zip(old.param_groups, new.param_groups, strict=True)
        for a, b in zip(ga["params"], gb["params"], strict=True)
    ]
    for before, after in pairs:
        assert torch.equal(before["exp_avg"], after[EXP_AVG])
        assert torch.equal(before["exp_avg_sq"].sqrt(), after[EXP_AVG_ROOT])
    assert all(group["betas"] == (0.95, 0.95) and group["max_lr"] == LR for group in new.param_groups)
    assert s3.step(gradients(s3.net, 3))
    # and the converted run's own checkpoint is an S3 checkpoint
    own = shared_folder()
    save(s3, own, "fully_reshardable")
    load(Run(sharded=sharded), own, "fully_reshardable")
    refuses(lambda: load(Run(optimizer="adam", sharded=sharded), own, "fully_reshardable"), "--optimizer s3")


def check_the_legacy_format_is_converted_after_its_second_call() -> None:
    """--ckpt-format torch loads groups first and a DistributedOptimizer's tensors by a call of their own."""
    adam = Run(optimizer="adam")
    adam.step(gradients(adam.net, 0))
    file = str(shared_folder() / "distrib_optim.pt")
    adam.optimizer.save_parameter_state(file)
    saved = [adam.optimizer.state_dict() for _ in range(2)]
    refuses(lambda: Run().optimizer.load_state_dict(saved[0]), "--s3-from-adam")
    s3 = Run(s3_from_adam=True)
    s3.optimizer.load_state_dict(saved[1])
    s3.optimizer.load_parameter_state(file)
    for before, after in zip(adam.part.optimizer.state.values(), s3.part.optimizer.state.values(), strict=True):
        assert torch.equal(before["exp_avg"], after[EXP_AVG])
        assert torch.equal(before["exp_avg_sq"].sqrt(), after[EXP_AVG_ROOT])


def _as_megatron_bridge(config: S3OptimizerConfig, chunks: list, overrides: None) -> MegatronOptimizer:
    """What setup_optimizer of Megatron-Bridge 0.6.2 needs of a config; Bridge itself imports Transformer Engine, which
    needs a GPU. ``overrides`` is the harness's: Bridge makes its own."""
    config.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    overrides = get_standard_config_overrides(config)
    return config.provide(
        model_chunks=chunks, config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
    )


def check_megatron_bridges_hook_equals_the_unsharded_run() -> None:
    """Although install() was never called, or undone."""
    uninstall()
    try:
        run = Run(dtype=torch.bfloat16, make=_as_megatron_bridge)
        assert isinstance(run.part, DistributedOptimizer) and type(run.part.optimizer) is S3
        compare(run)
    finally:
        install()


def check_what_s3_cannot_do_is_refused_in_a_config_too() -> None:
    refuses(lambda: Run(optimizer_cpu_offload=True), "--optimizer-cpu-offload", "drop the flag")


def check_other_hyperparameters_are_refused() -> None:
    run = Run()
    run.step(gradients(run.net, 0))
    folder = shared_folder()
    save(run, folder, "fully_reshardable")
    for setting in ({"s3_beta": 0.9}, {"s3_p": 2.0}, {"s3_nesterov": False}):
        refuses(lambda s=setting: load(Run(**s), folder, "fully_reshardable"), "--s3-override-hyperparameters")
    other = Run(s3_p=2.0, s3_beta=0.9, s3_override_hyperparameters=True)
    load(other, folder, "fully_reshardable")
    assert all(group["p"] == 2.0 and group["betas"] == (0.9, 0.9) for group in other.optimizer.param_groups)


def check_a_plain_optimizer_config_is_refused() -> None:
    net = Run().ddp
    plain = OptimizerConfig(optimizer="s3", lr=LR, use_distributed_optimizer=True)
    refuses(lambda: get_megatron_optimizer(plain, [net]), "S3OptimizerConfig")


def main(output: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = rank_checks.named(
        *(sys.modules[__name__], passes, resumes, watching, toy, softsignum, soft_passes, softmuon, experts),
        softmuon_experts,
    )
    rank_checks.run(found, names, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
