"""Runs on ranks, from worker.py: SoftMuon on Megatron's road for whole matrices, S3 beside it, in both phases."""

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from torch import nn

from s3_megatron.engines.megatron import SoftMuonOptimizerConfig
from s3_megatron.engines.megatron.factory import parts_of
from s3_megatron.optim import S3, SoftMuon, SoftSignum
from tests.engines.megatron import harness as on
from tests.engines.megatron.softmuon_harness import (
    CUT,
    EXPERT,
    HARD,
    HIGHEST,
    QKV,
    SHAPES,
    STEPS,
    Run,
    advance,
    alone,
    compare,
    mine,
    size,
    trained,
    unsharded,
    whole_gradients,
    whole_weights,
)
from tests.rank_checks import refuses, shared_folder


def check_softmuon_layer_wise_equals_the_unsharded_run() -> None:
    """Whole matrices on a data-parallel rank each: the map has the same input, so masters agree to 1e-6 of a step.

    With weight decay, QKV split, S3 beside it on shards, or in the layer-wise optimizer too, as where a model is built
    from a configuration; in float32 without that optimizer: every rank has all matrices, which count once for the
    temperature.
    """
    on.since(19, "road for whole matrices")
    with on.parallel(1):
        for precision, layer_wise, layout in (
            ("bf16", True, True),
            ("bf16", True, False),
            (None, False, False),
            ("bf16", False, False),
        ):
            run = Run(precision=precision, layer_wise=layer_wise, layout=layout)
            optimizers, copies = unsharded()
            for step in range(STEPS):
                assert run.softmuon.tau == optimizers[0].tau, (step, run.softmuon.schedule, optimizers[0].schedule)
                assert run.step(whole_gradients(step))
                advance(optimizers, copies, whole_gradients(step))
            compare(run, optimizers, copies, 1e-6)
            counts: list[int] = [0] * dist.get_world_size()
            dist.all_gather_object(counts, len(run.masters()))
            assert sum(counts) == (len(SHAPES) if layer_wise else len(SHAPES) * len(counts)), counts
            assert type(run.of(S3)) is S3


def check_softmuons_rest_is_gathered_where_one_group_has_all_buckets() -> None:
    """A virtual pipeline's second chunk: ranks went on with embeddings of the step before, each with its own."""
    on.since(19, "road for whole matrices")
    with on.parallel(1):
        run = Run(bucketing=False)
        assert len(run.ddp.bucket_groups) == 1 and len(run.ddp.buffers) == 2
        compare(run, *trained(run), 1e-6)


def check_softmuon_moves_experts_and_ranks_without_a_matrix_take_part() -> None:
    """Experts are a group of the layer-wise optimizer's, and a second optimizer without it. Of one matrix all ranks but
    one hold nothing, and wait for no one where the temperature is taken."""
    on.since(19, "road for whole matrices")
    with on.parallel(1):
        with patch.dict(SHAPES, {EXPERT: (6, 8)}):
            run = Run()
            compare(run, *trained(run), 1e-6)
            run = Run(layer_wise=False)
            optimizers, copies = trained(run)
            both = [each for part in parts_of(run.optimizer) if type(each := part.optimizer) is SoftMuon]
            assert len(both) == 2 and both[0].schedule == both[1].schedule
            for a, b in zip(both[1].schedule[:2], optimizers[0].schedule[:2], strict=True):
                assert abs(a - b) <= 1e-6 * abs(b), (a, b)
            for name in SHAPES:
                master = run.net.get_parameter(name).main_param
                torch.testing.assert_close(master, copies[name].data, rtol=1e-6, atol=1e-6 * on.LR)
        with patch.dict(SHAPES, {"fc1.weight": (20, 8)}, clear=True):
            run = Run()
            compare(run, *trained(run), 1e-6)
            counts: list[int] = [0] * dist.get_world_size()
            dist.all_gather_object(counts, len(run.masters()))
            assert sorted(counts) == [0] * (len(counts) - 1) + [1]


def check_softmuon_beside_adam_and_softsignum() -> None:
    """SoftSignum takes its temperature over the rest, SoftMuon over the matrices; Adam is Megatron's own."""
    on.since(19, "road for whole matrices")

    with on.parallel(1):
        for layer_wise, layout in ((True, True), (True, False), (False, False)):
            soft = ("--softmuon-scalar-optimizer", "softsignum", "--softsignum-soft-start", "0.5")
            run = Run(*soft, layer_wise=layer_wise, layout=layout)
            optimizers, copies = trained(run, {"rest": SoftSignum})
            compare(run, optimizers, copies, 1e-6)
            assert run.of(SoftSignum).schedule == optimizers[1].schedule
            run = Run("--softmuon-scalar-optimizer", "adam", layer_wise=layer_wise)
            adam, copies = run.of(torch.optim.AdamW), trained(run)[1]
            assert {*adam.param_groups[0]} >= {"amsgrad"}
            for name in run.masters():
                torch.testing.assert_close(run.masters()[name], copies[name].data, rtol=1e-6, atol=1e-6 * on.LR)


def check_softmuon_under_tensor_parallelism_equals_the_unsharded_run() -> None:
    """Gathered matrices have the map of whole ones to 1e-6 of a step; mapped together, products are summed in another
    order, which float32 carries through 8 to 20 steps to 1e-5. On 4 ranks beside layer-wise data parallelism."""
    on.since(19, "road for whole matrices")
    with on.parallel(2):
        for mode, error in (("duplicated", 1e-6), ("distributed", 1e-5)):
            run = Run("--softmuon-tp-mode", mode, *HIGHEST)
            compare(run, *trained(run, {"fp32_matmul_prec": "highest"}), error)
            schedules: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(schedules, run.softmuon.schedule)
            assert len({*schedules}) == 1
        for layer_wise in (True, False):
            run = Run(layer_wise=layer_wise)
            compare(run, *trained(run), 1e-6)


def check_softmuon_under_context_parallelism_equals_the_unsharded_run() -> None:
    """Context-parallel ranks have the same weights, as data-parallel ones have: matrices are shared out over both, and
    counted once. On 4 ranks beside data- and beside tensor-parallel ones."""
    on.since(19, "road for whole matrices")
    for tensor in sorted({1, dist.get_world_size() // 2}):
        with on.parallel(tensor, context=2):
            for layer_wise, layout in ((True, True), (True, False), (False, False)):
                run = Run(layer_wise=layer_wise, layout=layout)
                compare(run, *trained(run), 1e-6)
                counts: list[int] = [0] * dist.get_world_size()
                dist.all_gather_object(counts, len(run.masters()))
                assert sum(counts) == len(SHAPES) * (tensor if layer_wise else len(counts)), counts


def check_softmuon_blockwise_maps_each_ranks_part() -> None:
    on.since(19, "road for whole matrices")
    with on.parallel(2):
        run = Run("--softmuon-tp-mode", "blockwise")
        phases = {"total_steps": STEPS, "soft_start": 0.5, "process_group": alone(), "weight_decay": on.DECAY}
        copies = {
            (name, i): nn.Parameter(part.clone())
            for name in SHAPES
            for i, part in enumerate(
                whole_weights()[name].chunk(size(), CUT[name]) if name in CUT else [whole_weights()[name]]
            )
        }
        groups = [
            {"params": [p], **({"qkv_split_shapes": QKV} if "qkv" in name else {})} for (name, _), p in copies.items()
        ]
        blocks = SoftMuon(groups, on.LR, **phases)
        for step in range(STEPS):
            grads = whole_gradients(step)
            assert run.step(grads)
            for (name, i), param in copies.items():
                param.grad = grads[name].chunk(size(), CUT[name])[i].clone() if name in CUT else grads[name]
            blocks.step()
        rank = parallel_state.get_tensor_model_parallel_rank()
        for name, master in run.masters().items():
            wanted = copies[name, rank if name in CUT else 0].data
            torch.testing.assert_close(master, wanted, rtol=1e-6, atol=1e-6 * on.LR)
        for a, b in zip(run.softmuon.schedule[:2], blocks.schedule[:2], strict=True):
            assert abs(a - b) <= 1e-6 * abs(b), (a, b)
        on.save(run, folder := shared_folder(), "fully_reshardable")
        for mode in ("duplicated", "distributed"):
            refuses(
                lambda m=mode: on.load(Run("--softmuon-tp-mode", m), folder, "fully_reshardable"),
                *("tp_mode=blockwise over 2 ranks", "asks for tp_mode=whole", "--softmuon-override-hyperparameters"),
            )
        on.load(Run("--softmuon-tp-mode", "blockwise"), folder, "fully_reshardable")


def check_softmuons_hard_phase_is_megatrons_muon() -> None:
    """With QKV split, in its modes of tensor parallelism. Both round the same products to bfloat16, 2^-8 each, in five
    steps with factors up to 4.8; ours are scaled by a power of 2 first: 3e-2 of a step."""
    on.since(19, "road for whole matrices")
    ours = ("--softmuon-soft-start", "1")
    theirs = ("--muon-momentum", "0.95", "--muon-nesterov", "--muon-extra-scale-factor", "0.2")
    for ranks, mode in ((1, "duplicated"), (2, "duplicated"), (2, "distributed"), (2, "blockwise")):
        for scale in ("spectral", "unit_rms_norm") if mode == "distributed" else ("spectral",):
            with on.parallel(ranks):
                run = Run(*ours, "--softmuon-tp-mode", mode, "--softmuon-scale-mode", scale)
                muon = Run(*theirs, "--muon-tp-mode", mode, "--muon-scale-mode", scale, optimizer="muon")
                for step in range(STEPS):
                    assert run.step(whole_gradients(step)) and muon.step(whole_gradients(step))
                held = {name: p for name, p in muon.net.named_parameters() if hasattr(p, "main_param")}
                for name, master in run.masters().items():
                    other = held[name].main_param
                    torch.testing.assert_close(master, other, rtol=1e-6, atol=3e-2 * on.LR * 0.2 * STEPS)
                    moved = (master - mine(name, whole_weights()[name])).abs().max()
                    assert moved > 3 * 3e-2 * on.LR * 0.2 * STEPS


def check_softmuon_resumes_to_the_bit_in_both_phases() -> None:
    """Saved in the hard phase, where the soft one begins, and in it; the length of a run that is resumed in the hard
    phase counts, and another hyperparameter of the state is refused."""
    on.since(19, "road for whole matrices")
    with on.parallel(1):
        for kind, layer_wise in (("dp_reshardable", True), ("fully_reshardable", True), ("none", False)):
            run, resumed = Run(layer_wise=layer_wise), []
            for step in range(STEPS):
                if step in (2, HARD, HARD + 2):
                    on.save(run, folder := shared_folder(), kind)
                    resumed.append(Run(layer_wise=layer_wise))
                    resumed[-1].net.load_state_dict(run.net.state_dict())
                    on.load(resumed[-1], folder, kind)
                    on.set_decay(resumed[-1])
                assert all(each.step(whole_gradients(step)) for each in (run, *resumed))
            tensors, numbers = run.everything()
            assert numbers[0].first == HARD
            for other in resumed:
                theirs, found = other.everything()
                assert found == numbers, kind
                assert all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True)), kind
        on.save(run, folder := shared_folder(), kind)
        refuses(
            lambda: on.load(Run("--softmuon-beta", "0.8", layer_wise=False), folder, kind),
            *("SoftMuon with beta=0.95", "--softmuon-override-hyperparameters"),
        )

        def onto(*flags: str) -> Run:
            on.load(other := Run(*flags, layer_wise=False), folder, kind)
            return other

        for beside, advice in (("adam", "optimizer state is S3's"), ("softsignum", "written by optimizer s3")):
            flags = "--softmuon-scalar-optimizer", beside, "--softsignum-soft-start", "0.5"
            refuses(lambda f=flags: onto(*f), advice, "--softmuon-scalar-optimizer")
        # The checkpoint's counted for all but the last one, in silence.
        for name, value in (
            ("scale_mode", "unit_rms_norm"),
            ("extra_scale_factor", 1.0),
            ("coefficient_type", "simple"),
            ("num_ns_steps", 7),
            ("fp32_matmul_prec", "highest"),
            ("split_qkv", False),
        ):
            flag = f"--softmuon-{name.replace('_', '-')}", f"{value}"
            given = flag if name != "split_qkv" else ("--softmuon-no-split-qkv",)
            refuses(lambda g=given: onto(*g), f"asks for {name}={value}", "--softmuon-override-hyperparameters")
            other = onto(*given, "--softmuon-override-hyperparameters")
            assert other.softmuon.param_groups[0][name] == value
            assert (other.softmuon.qkv_of(other.net.linear_qkv.weight) is None) is (name == "split_qkv")
        onto("--softmuon-tp-mode", "blockwise")  # of whole matrices that is the same


def check_softmuon_goes_on_under_another_layout() -> None:
    """Data-parallel ranks become tensor-parallel ones, and back, in both phases: m, masters and temperature are there.

    Weights to 1e-6 of a step, as without the change.
    """
    on.since(19, "road for whole matrices")
    for saved_at in (2, HARD + 2):
        for before, after in ((1, 2), (2, 1)):
            with on.parallel(before):
                run = Run()
                for step in range(saved_at):
                    assert run.step(whole_gradients(step))
                on.save(run, folder := shared_folder(), "fully_reshardable")
                weights = {}
                for name, weight in run.weights().items():
                    parts = [torch.empty_like(weight) for _ in range(before)]
                    dist.all_gather(parts, weight, group=parallel_state.get_tensor_model_parallel_group())
                    weights[name] = torch.cat(parts, CUT[name]) if name in CUT else weight
            with on.parallel(after):
                run, (optimizers, copies) = Run(), unsharded()
                for name, param in run.net.named_parameters():
                    param.data.copy_(mine(name, weights[name]))
                on.load(run, folder, "fully_reshardable")
                on.set_decay(run)
                for step in range(STEPS):
                    if step >= saved_at:
                        assert run.step(whole_gradients(step))
                    advance(optimizers, copies, whole_gradients(step))
                compare(run, optimizers, copies, 1e-6)


# A hard step, the one at which the temperature is taken, and a soft one.
BROKEN = (1, HARD, HARD + 1)


def check_a_nan_gradient_leaves_a_matrix_on_all_ranks() -> None:
    """One entry, in what one tensor-parallel rank has; Megatron looks for it only where it is asked to."""
    on.since(19, "road for whole matrices")
    with on.parallel(2):
        for mode in ("duplicated", "distributed"):
            run = Run("--softmuon-tp-mode", mode)
            for step in range(STEPS):
                before = run.masters()
                grads = whole_gradients(step)
                if step in BROKEN:
                    grads["fc1.weight"][0, 0], grads["fc2.weight"][0, 19] = float("nan"), float("inf")
                assert run.step(grads)
                for name, master in run.masters().items():
                    is_left = name in ("fc1.weight", "fc2.weight") and step in BROKEN
                    assert torch.equal(master, before[name]) is is_left and master.isfinite().all(), (step, name)
            assert run.softmuon.schedule.first == HARD


def check_softmuon_by_its_configuration() -> None:
    """As Megatron-Bridge builds it, which wraps the model for shards unless it is asked not to. Each rank stepped every
    matrix with a gradient of which one shard was the average, in silence."""
    on.since(19, "road for whole matrices")
    settings = {"lr": on.LR, "weight_decay": on.DECAY, "clip_grad": 0.0, "bf16": True, "params_dtype": torch.bfloat16}
    phases = {"softmuon_total_steps": STEPS, "softmuon_soft_start": 0.5}

    def provided(shards: bool = False, **own: Any) -> Run:
        config = SoftMuonOptimizerConfig(**settings, **{**phases, **own})
        config.finalize()
        return Run(make=config.provide, layout=False, shards=shards)

    with on.parallel(1):
        for layer_wise in (True, False):
            run = provided(use_layer_wise_distributed_optimizer=layer_wise)
            compare(run, *trained(run), 1e-6)
        refuses(lambda: provided(softmuon_total_steps=None), "the length of the run is not known")
        refuses(lambda: provided(softmuon_scale_mode="frobenius"), "spectral, unit_rms_norm, shape_scaling")
        # They were taken for "distributed" and for Adam.
        refuses(lambda: provided(softmuon_tp_mode="whole"), "duplicated, distributed, blockwise")
        refuses(lambda: provided(softmuon_scalar_optimizer="lion"), "s3, adam, softsignum")
        for layer_wise in (True, False):
            refuses(
                lambda w=layer_wise: provided(shards=True, use_layer_wise_distributed_optimizer=w),
                *("gradients reduced into shards", "use_layer_wise_distributed_optimizer=True"),
            )
        plain = OptimizerConfig(optimizer="softmuon", **settings)
        refuses(lambda: Run(make=lambda c: on.get_megatron_optimizer(plain, c)), "megatron.SoftMuonOptimizerConfig")


def check_softmuons_bad_flags_are_refused() -> None:
    on.since(19, "road for whole matrices")
    for bad, message in (
        (("--softmuon-scale-mode", "frobenius"), "it must be one of spectral, unit_rms_norm, shape_scaling"),
        (("--softmuon-tp-mode", "whole"), "it must be one of duplicated, distributed, blockwise"),
        (("--softmuon-scalar-optimizer", "lion"), "it must be one of s3, adam, softsignum"),
        (("--softmuon-coefficient-type", "custom"), "it must be one of simple, quintic"),
        (("--softmuon-extra-scale-factor", "0"), "--softmuon-extra-scale-factor is 0.0"),
        (("--softmuon-num-ns-steps", "0"), "--softmuon-num-ns-steps is 0"),
        (("--softmuon-sign-iters", "3", "--softmuon-transition-iters", "0"), "transition_iters is 0"),
        (("--softmuon-tmax", "-1"), "--softmuon-tmax is -1.0"),
        (("--s3-beta", "2"), "--s3-beta is 2.0"),
        (("--ckpt-format", "torch"), "give --ckpt-format torch_dist"),
        (("--optimizer-cpu-offload",), "does not work with --optimizer softmuon"),
    ):
        refuses(lambda b=bad: Run(*b), message)
    refuses(lambda: Run("--softmuon-soft-start", "-0.5"), "--softmuon-soft-start is -0.5")
    refuses(lambda: Run(precision="fp16"), "train in --bf16")
    refuses(lambda: Run(precision=None), "needs --bf16")
    with patch.dict(SHAPES, {"gate.weight": (0, 8)}):
        refuses(Run, "[0, 8], no element")
    with patch.dict(
        SHAPES, clear=True
    ):  # an assertion of Megatron's without a text, or the advice to give soft_start 1
        for layout in (True, False):
            refuses(lambda w=layout: Run(layout=w), "a rank has no matrix to train", "--optimizer s3")
    with patch.dict(sys.modules, {"emerging_optimizers.orthogonalized_optimizers.muon": None}):
        refuses(Run, "SoftMuon needs emerging-optimizers 0.3", "pip install")


def check_softmuon_needs_the_road_for_whole_matrices() -> None:
    """On 0.17 and 0.18 as they are; here with that part of 0.19 taken away."""
    from s3_megatron.engines.megatron import layer_wise

    older = SimpleNamespace(DistributedOptimizer=object)
    with patch.object(layer_wise, "host", older if on.MINOR >= 19 else layer_wise.host):
        refuses(Run, "needs megatron-core 0.19", "install 0.19")
