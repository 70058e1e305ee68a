"""Checks for worker.py: S3's single pass under Megatron does what the host's separate passes do."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.optimizer import DistributedOptimizer, clip_grads
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from s3_megatron.engines.megatron import install, single_pass, uninstall
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT
from tests.engines.megatron.harness import LR, Net, Run, gradients, load, save, set_decay, since
from tests.rank_checks import refuses, shared_folder

TWENTY = 20
HALVES = (torch.bfloat16, torch.float16)
MOVING_SCALE = {"initial_loss_scale": 1024.0, "min_loss_scale": 1.0, "loss_scale_window": 3, "hysteresis": 1}


class Experts(Net):
    """Net with the linear layer as an expert: Megatron makes two optimizers of it."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__()
        for param in self.linear.parameters():
            param.allreduce = False


class Apart(Net):
    """Net with the embedding's gradient norm taken, and clipped, apart."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__()
        self.embedding.weight.grad_norm_group = "mtp"


def separate(*, net: nn.Module | None = None, **settings: object) -> Run:
    """A run whose passes are the host's."""
    with patch.object(single_pass, "fuse", lambda part: None):
        return Run(net=net, **settings)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the host's passes over gradients and weights; runs must be made inside."""
    counts = dict.fromkeys(("unscale", "clip", "copy"), 0)

    def count(name: str, owner: object, symbol: str) -> object:
        original = getattr(owner, symbol)

        def call(*args: object, **kwargs: object) -> object:
            counts[name] += 1
            return original(*args, **kwargs)

        return patch.object(owner, symbol, call)

    copy = "_copy_main_params_to_model_params"
    with (
        count("unscale", torch, "_amp_foreach_non_finite_check_and_unscale_"),
        count("clip", clip_grads, "multi_tensor_scale_impl"),
        count("copy", DistributedOptimizer, copy),
        count("copy", Float16OptimizerWithFloat16Params, copy),
    ):
        yield counts


def in_step(
    merged: Run, apart: Run, *, steps: int = TWENTY, broken: dict[int, float] | None = None, near: float = 1e-6
) -> None:
    """Step both runs with the same gradients, and compare what they return at every step and hold at the end.

    ``broken`` puts one bad gradient, on one rank, into a step. The factor 1e-6 is 8 ULP of float32: the runs multiply
    the same numbers, the merged one by a product where the host multiplies twice. m's is of its largest element, since
    m may cancel. m and r are compared because S3's weights hardly depend on a factor of the gradients. ``near`` is 0
    where both have the same bits.
    """
    for step in range(steps):
        results = []
        for run in (merged, apart):
            set_decay(run)
            grads = gradients(run.net, step)
            if broken and step in broken and dist.get_rank() == 0:
                grads["linear.weight"][3, 4] = broken[step]
            results.append((run.step(grads), run.grad_norm, run.optimizer.get_loss_scale().item()))
            assert all(part.optimizer.next_step is None for part in run.optimizer.chained_optimizers)
        (took, norm, scale), (took_apart, norm_apart, scale_apart) = results
        assert (took, scale, norm is None) == (took_apart, scale_apart, norm_apart is None), f"step {step}: {results}"
        if norm is not None:
            torch.testing.assert_close(norm, norm_apart, rtol=1e-6, atol=0.0, equal_nan=True)
        named = [getattr(run.optimizer, "grad_norms_by_group", {}) for run in (merged, apart)]  # 0.19 has them
        torch.testing.assert_close(named[0], named[1], rtol=1e-6, atol=0.0)
    for kind in ("masters", *merged.optimizer.chained_optimizers[0].optimizer.spec.state_names):
        for a, b in zip(held(merged, kind), held(apart, kind), strict=True):
            atol = near * (LR if kind == "masters" else b.abs().max().item() if b.numel() else 0.0)
            torch.testing.assert_close(a, b, rtol=near, atol=atol, msg=lambda m, k=kind: f"{k}: {m}")
            assert kind == "masters" or not b.numel() or b.abs().max() > 0
    weights = apart.weights()
    for name, weight in merged.weights().items():
        rounding = near if weight.dtype == torch.float32 or not near else torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight, weights[name], rtol=rounding, atol=near * LR)
    rounded(merged)


def held(run: Run, kind: str) -> list[Tensor]:
    """The masters, or one state, of this rank."""
    inners = [part.optimizer for part in run.optimizer.chained_optimizers]
    params = [(inner, param) for inner in inners for group in inner.param_groups for param in group["params"]]
    return [param.detach() if kind == "masters" else inner.state[param][kind] for inner, param in params]


def rounded(run: Run) -> None:
    """The model's weights are the masters, rounded, bit for bit."""
    for part in run.optimizer.chained_optimizers:
        pairs = []
        if isinstance(part, DistributedOptimizer):
            pairs = list(single_pass._model_shards(part))
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            pairs = single_pass._pairs(part.fp32_from_float16_groups, part.float16_groups)
        for main, model in pairs:
            assert torch.equal(main.to(model.dtype), model.detach())


def check_single_pass_equals_separate_passes() -> None:
    """Every optimizer and dtype, clipped on 4 of 5 steps (the norm is about 41 times 0.01 to 100) and not at all."""
    for dtype in (torch.float32, torch.bfloat16):
        for sharded in (True, False):
            for clip in (0.0, 1.0):
                setting = {"dtype": dtype, "sharded": sharded, "clip_grad": clip}
                in_step(Run(**setting), separate(**setting))


def check_single_pass_with_a_moving_loss_scale_and_overflows() -> None:
    """An inf and a NaN on one rank in 20 steps; the scale doubles after 3 good steps and halves after a bad one."""
    for sharded in (True, False):
        for clip in (0.0, 1.0):
            setting = {"dtype": torch.float16, "sharded": sharded, "clip_grad": clip, **MOVING_SCALE}
            # Without sharding the gradients are summed, so every rank sees the bad one.
            in_step(Run(**setting), separate(**setting), broken={5: float("inf"), 12: float("nan")})


def check_single_pass_without_a_loss_scale_meets_bad_gradients() -> None:
    """No step is skipped in bf16: the norm is NaN or inf, and nothing, or all but the bad coordinate, is clipped."""
    setting = {"dtype": torch.bfloat16, "clip_grad": 1.0}
    in_step(Run(**setting), separate(**setting), steps=5, broken={1: float("nan"), 3: float("inf")})


def check_single_pass_in_two_optimizers_of_a_chain() -> None:
    for dtype in HALVES:
        setting = {"dtype": dtype, "clip_grad": 1.0, **MOVING_SCALE}
        run = Run(net=Experts(), **setting)
        assert len(run.optimizer.chained_optimizers) == 2
        in_step(run, separate(net=Experts(), **setting))


def check_single_pass_with_norms_taken_apart() -> None:
    """A rank that holds weights of both groups has two factors, so its clipping is the host's; the rest is merged."""
    since(19, "gradient norms taken apart")
    for dtype in HALVES:
        setting = {"dtype": dtype, "clip_grad": 1.0, **MOVING_SCALE}
        with counted() as counts:
            run = Run(net=Apart(), **setting)
            in_step(run, separate(net=Apart(), **setting))
            assert run.optimizer.grad_norms_by_group["mtp"] > 0
            before = dict(counts)
            assert run.step(gradients(run.net, 4))
        mixed = len({hasattr(param, "grad_norm_group") for param in run.part.get_parameters()}) == 2
        everywhere: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(everywhere, mixed)
        assert any(everywhere)
        # The host scales twice where both groups' norms are above the limit.
        assert counts["clip"] - before["clip"] == 2 * mixed and counts["copy"] == before["copy"]


def check_a_step_does_not_wait_for_every_gradient() -> None:
    """Without Transformer Engine and Apex the host reads a norm a tensor: some 300 waits a step of 345M weights, in
    bf16 longer than the step. What is read is counted, for here nothing waits."""
    setting = {"dtype": torch.bfloat16, "clip_grad": 1.0}
    merged, apart = Run(**setting), separate(**setting)
    seen = []
    for run in (merged, apart):
        with patch.object(torch, "norm", wraps=torch.norm) as norms:
            assert run.step(gradients(run.net, 0))
        seen.append(norms.call_count)
    tensors = len([param for param in apart.part.get_parameters() if param.grad is not None])
    assert seen == [2 * bool(tensors), tensors + bool(tensors)], f"norms of {tensors} tensors, and one of these"


def check_single_pass_is_taken() -> None:
    """The host's passes are not called; without the single pass each is, which shows that the count can fail."""
    for sharded in (True, False):
        for dtype in HALVES:
            setting = {"dtype": dtype, "sharded": sharded, "clip_grad": 1.0, **MOVING_SCALE}
            for make, expected in ((Run, 0), (separate, 1)):
                with counted() as counts:
                    run = make(**setting)
                    assert run.step(gradients(run.net, 4))
                wanted = {"unscale": expected * (dtype == torch.float16), "clip": expected, "copy": expected}
                assert counts == wanted, f"{make.__name__} {sharded} {dtype}: {counts}"


def check_float32_shards_are_the_models_own_weights() -> None:
    """The host copies them onto themselves, so there is nothing for the kernel to write."""
    with counted() as counts:
        run = Run()
        assert list(single_pass._model_shards(run.part)) == []
        assert run.step(gradients(run.net, 0)) and counts["copy"] == 0


def check_skipped_by_the_hosts_threshold_leaves_no_factor() -> None:
    """A step skipped after clipping keeps its factor out of the next; the threshold sees the unscaled norm."""
    since(18, "threshold for the gradients' norm")
    for dtype in HALVES:
        setting = {"dtype": dtype, "clip_grad": 100.0, "grad_norm_skip_threshold": 1000.0, **MOVING_SCALE}
        runs = Run(**setting), separate(**setting)
        for step in (4, 0, 1):  # norms of about 4100, 0.4 and 4
            for run in runs:
                assert run.step(gradients(run.net, step)) == (step != 4)
        for kind in (EXP_AVG, EXP_AVG_ROOT):
            for a, b in zip(held(runs[0], kind), held(runs[1], kind), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


def check_single_pass_is_not_taken_where_the_host_quantizes() -> None:
    setting = {"dtype": torch.bfloat16, "clip_grad": 1.0}
    with counted() as counts, patch.object(single_pass, "_copies_otherwise", lambda part: True):
        run = Run(**setting)
        in_step(run, separate(**setting), steps=5)
    assert counts["copy"] == 10 and counts["clip"] == 4, counts


def check_loading_and_copying_write_the_model() -> None:
    for sharded in (True, False):
        first, second = (Run(dtype=torch.bfloat16, sharded=sharded) for _ in range(2))
        first.step(gradients(first.net, 0))
        second.step(gradients(second.net, 1))
        folder = shared_folder()
        save(first, folder, "fully_reshardable")
        load(second, folder, "fully_reshardable")
        second.part._copy_main_params_to_model_params()
        rounded(second)
        second.step(gradients(second.net, 2))
        first.step(gradients(first.net, 2))
        rounded(second)
        assert all(torch.equal(a, b) for a, b in zip(first.inner_tensors(), second.inner_tensors(), strict=True))


def check_a_moved_parameter_buffer_is_written() -> None:
    run = Run(dtype=torch.bfloat16)
    run.step(gradients(run.net, 0))
    for buffer in run.part.buffers:
        for bucket in buffer.buckets:
            bucket.param_data = bucket.param_data.clone()
    for group in run.ddp.bucket_groups:
        group.cached_param_buffer_shard_list = [None] * len(group.buckets)  # what the host gathers from
    run.step(gradients(run.net, 1))
    rounded(run)


def check_a_run_outlives_uninstall() -> None:
    """The host's norm, back in its place, must not see scaled gradients."""
    setting = {"dtype": torch.float16, "clip_grad": 1.0, **MOVING_SCALE}
    merged, apart = Run(**setting), separate(**setting)
    uninstall()
    try:
        in_step(merged, apart, steps=5)
    finally:
        install()


def check_a_moved_method_is_loud() -> None:
    with patch.object(single_pass, "_MIXED_METHODS", ("_moved",)):
        refuses(lambda: Run(dtype=torch.bfloat16), "DistributedOptimizer has no _moved")
