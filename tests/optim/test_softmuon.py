"""SoftMuon: hard phase against torch's Muon and Megatron's, soft phase against the reference, saving."""

import copy
import math

import pytest
import torch
from torch import nn

from s3_megatron.errors import S3Error
from s3_megatron.optim.softmuon import SoftMuon
from s3_megatron.optim.softmuon_reference import softmuon_reference_step
from s3_megatron.optim.state import EXP_AVG
from s3_megatron.optim.temperature import Schedule
from s3_megatron.watch import statistics
from tests.optim.matrices import DECAY, LR, matrices, train


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# In units of a step: both round products to bfloat16, 2^-8 each, five steps with factors up to 4.8; torch divides by
# the norm after rounding, emerging-optimizers before.
BF16 = 3e-2


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mode", ["original", "match_rms_adamw"])
def test_the_hard_phase_is_torchs_muon(nesterov, mode):
    scale = {"scale_mode": "shape_scaling", "extra_scale_factor": 1.0} if mode == "original" else {}
    ours, theirs = matrices(), matrices()
    steps = 5
    settings = {"lr": LR, "weight_decay": DECAY, "nesterov": nesterov}
    train(SoftMuon(ours, soft_start=1, coefficient_type="simple", **settings, **scale), range(steps))
    train(torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn=mode, **settings), range(steps))
    for x, y, start in zip(ours, theirs, matrices(), strict=True):
        factor = max(1, x.shape[0] / x.shape[1]) ** 0.5 if mode == "original" else 0.2 * max(x.shape) ** 0.5
        torch.testing.assert_close(x, y, rtol=0, atol=BF16 * steps * LR * factor)
        assert (x - start).abs().max() > 10 * BF16 * LR * factor, "both moved further than the tolerance"


@pytest.mark.parametrize("polynomials, length", [("quintic", 0.996), ("simple", 0.89)])
def test_how_long_a_hard_step_is_beside_the_first_soft_one(polynomials, length):
    """Incident: after torch's polynomials, which comparisons take, steps became 8% longer at the switch."""
    x = torch.nn.Parameter(torch.zeros(128, 128))
    x.grad = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    optimizer = SoftMuon(
        [x], lr=1.0, weight_decay=DECAY, total_steps=2, soft_start=0.5, scale_mode="unit_rms_norm",
        extra_scale_factor=1.0, coefficient_type=polynomials,
    )  # fmt: skip
    lengths = []
    for _ in range(2):
        with torch.no_grad():
            x.zero_()
        optimizer.step()
        lengths.append(x.detach().square().mean().sqrt().item() * 128**0.5)  # root mean square of singular values
    # Five other matrices had .992 to .996 and .882 to .888; CPUs differ by bfloat16's rounding, whose mean is less.
    assert lengths == pytest.approx([length, 1.0], abs=0.01)


@pytest.mark.parametrize("mode", ["spectral", "unit_rms_norm", "shape_scaling"])
@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_the_hard_phase_is_megatrons_muon(mode, precision):
    """To 1e-6 of a step in float32, of which both do the same arithmetic; with QKV split by head groups."""
    host = pytest.importorskip("megatron.core.optimizer.emerging_optimizers", reason="megatron-core 0.19 has a Muon")
    shared = {"lr": LR, "weight_decay": DECAY, "nesterov": True, "scale_mode": mode, "extra_scale_factor": 0.2}
    shared |= {"fp32_matmul_prec": precision}
    ours, theirs = matrices([(12, 8), (24, 8)]), matrices([(12, 8), (24, 8)])
    qkv = (4, 2, 2)
    groups = [{"params": [ours[0]]}, {"params": [ours[1]], "qkv_split_shapes": qkv}]
    split = {"split_qkv": True, "is_qkv_fn": lambda p: p is theirs[1], "qkv_split_shapes": list(qkv)}
    train(SoftMuon(groups, soft_start=1, **shared), range(4))
    train(host.TensorParallelMuon(theirs, momentum=0.95, **split, **shared), range(4))
    for x, y, start in zip(ours, theirs, matrices([(12, 8), (24, 8)]), strict=True):
        step = LR * 0.2 * max(x.shape) ** 0.5
        torch.testing.assert_close(x, y, rtol=1e-6, atol=step * (1e-5 if precision == "highest" else BF16))
        assert (x - start).abs().max() > 10 * BF16 * LR * 0.2


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_soft_phase_is_the_references_and_its_schedule_the_closed_form(nesterov):
    """1e-5 of a step for the map in float32 (tests of the map), over six steps."""
    params = matrices()
    optimizer = SoftMuon(
        params, LR, 0.9, DECAY, nesterov=nesterov, sign_iters=0, transition_iters=6, fp32_matmul_prec="highest"
    )
    xs, ms = [x.detach().double() for x in params], [torch.zeros_like(x, dtype=torch.float64) for x in params]
    schedule = None
    for step in range(8):
        tau = optimizer.tau
        assert tau == (schedule.tau(step, 1e9) if schedule else 1e9)
        train(optimizer, [step])
        for i, x in enumerate(params):
            scale = 0.2 * max(x.shape) ** 0.5
            xs[i], ms[i], _ = softmuon_reference_step(
                xs[i],
                x.grad.double(),
                ms[i],
                lr=LR,
                tau=tau,
                beta=0.9,
                weight_decay=DECAY,
                nesterov=nesterov,
                scale=scale,
            )
            torch.testing.assert_close(x.detach().double(), xs[i], rtol=1e-6, atol=1e-5 * LR * (step + 1))
        if schedule is None:
            values = torch.cat([torch.linalg.svdvals(m) for m in ms])
            mu = values.median()
            schedule = Schedule(mu.item(), (values - mu).abs().median().item(), 1e-4, 0, 6, "algebraic")
            found = optimizer.schedule
            assert found[:2] == pytest.approx(schedule[:2], rel=1e-5) and found[2:] == schedule[2:]
            run = optimizer.param_groups[0]
            assert run["soft_norm"] == pytest.approx(max(m.norm().item() for m in ms), rel=1e-5)
            assert run["soft_largest"] == pytest.approx(values.max().item(), rel=1e-5)
            schedule = found
    assert optimizer.tau == schedule.tau(5, 1e9), "behind the end the last one stays"


def test_singular_values_of_every_piece_count_for_the_temperature():
    """Q, K and V apart, and each matrix of a stack."""
    fused, stack = torch.zeros(8, 3).requires_grad_(), torch.zeros(2, 4, 3).requires_grad_()
    optimizer = SoftMuon(
        [{"params": [fused], "qkv_split_shapes": (2, 1, 1)}, {"params": [stack]}], sign_iters=0, transition_iters=4
    )
    train(optimizer, [0])
    m, n = optimizer.state[fused][EXP_AVG], optimizer.state[stack][EXP_AVG]
    parts = [m[[0, 1, 4, 5]], m[[2, 6]], m[[3, 7]], n[0], n[1]]
    values = torch.cat([torch.linalg.svdvals(part) for part in parts])
    assert optimizer.schedule.mu == pytest.approx(values.median().item(), rel=1e-6)


def test_matrices_are_measured_where_they_are_largest_and_frozen_ones_too():
    """A plan for the smallest of a stack's takes too few steps for the largest, and its update is no map of m."""
    stack, frozen = torch.zeros(2, 4, 3).requires_grad_(), torch.zeros(6, 3).requires_grad_()
    optimizer = SoftMuon([stack, frozen], sign_iters=1, transition_iters=4)
    train(optimizer, [0])
    frozen.requires_grad_(requires_grad=False).grad = None
    stack.grad = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    stack.grad[0] *= 100
    optimizer.step()
    parts = [*optimizer.state[stack][EXP_AVG], optimizer.state[frozen][EXP_AVG]]
    values = torch.cat([torch.linalg.svdvals(part) for part in parts])
    group = optimizer.param_groups[0]
    assert group["soft_norm"] == pytest.approx(max(part.norm().item() for part in parts), rel=1e-6)
    assert group["soft_largest"] == pytest.approx(values.max().item(), rel=1e-6)
    assert optimizer.schedule.mu == pytest.approx(values.median().item(), rel=1e-6)


@pytest.mark.parametrize("asked", ["medium", "highest"])
def test_float32_products_that_are_asked_for_are_taken_in_soft_steps_too(asked):
    """At a tau so low that bfloat16 is close enough to the map, where nothing else is asked."""
    optimizer = SoftMuon(matrices(), LR, sign_iters=0, transition_iters=2, fp32_matmul_prec=asked)
    train(optimizer, [0])
    assert optimizer.plan(optimizer.param_groups[0], 1e-3)[1] == asked


def test_a_small_temperature_is_momentum_sgd():
    """lr * tau * m, to 1e-6 of its size: with tau*s = 1e-3 the map bends by half of its square."""
    x = matrices([(6, 4)])[0]
    # The lowest tau there is: 1. A rate of 1, so that a weight's rounding is none of the step's.
    optimizer = SoftMuon(
        [x],
        1.0,
        weight_decay=DECAY,
        nesterov=False,
        sign_iters=0,
        transition_iters=9,
        tmax=1.0,
        scale_mode="shape_scaling",
        extra_scale_factor=1.0,
        fp32_matmul_prec="highest",
    )
    before = x.detach().clone()
    train(optimizer, [0], size=5e-3)
    m = optimizer.state[x][EXP_AVG]
    assert torch.linalg.svdvals(m)[0] < 1.2e-3
    moved = (before.double() * (1 - DECAY) - x.detach()) / 1.5**0.5
    torch.testing.assert_close(moved, m.double(), rtol=0, atol=1e-6)


def test_an_infinite_temperature_is_the_hard_step():
    """The first soft step has tmax, which may be infinite; until a soft step with another tau both runs are one."""
    hard, soft = matrices(), matrices()
    train(SoftMuon(hard, LR, weight_decay=DECAY, soft_start=1), range(1))
    optimizer = SoftMuon(soft, LR, weight_decay=DECAY, sign_iters=0, transition_iters=5, tmax=math.inf)
    assert optimizer.tau == math.inf
    train(optimizer, range(1))
    assert same(hard, soft)
    train(optimizer, range(1, 3))
    assert all(x.isfinite().all() for x in soft) and optimizer.tau < math.inf


def test_update_has_singular_values_of_one_at_most_times_the_scale():
    """1e-5 in float32: the map's bound. In the hard phase Muon's own polynomials go up to about 1.2."""
    for soft, bound in ((True, 1 + 1e-5), (False, 1.25)):
        x = matrices([(12, 8)])[0]
        optimizer = SoftMuon([x], LR, sign_iters=0 if soft else 9, transition_iters=9, fp32_matmul_prec="highest")
        for step in range(9):
            before = x.detach().clone()
            train(optimizer, [step])
            assert torch.linalg.svdvals((before - x.detach()) / LR / 0.2 / 12**0.5)[0] <= bound


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("soft", [True, False])
def test_a_gradient_that_is_not_finite_leaves_the_whole_matrix(bad, soft):
    """Weight, decay and m of the matrix; the others move. Of a stack it is the one matrix, of QKV all three."""
    x, y, fused = matrices([(6, 4), (2, 5, 3), (8, 4)])
    groups = [{"params": [x, y]}, {"params": [fused], "qkv_split_shapes": (2, 1, 1)}]
    optimizer = SoftMuon(groups, LR, weight_decay=DECAY, sign_iters=0 if soft else 99, transition_iters=9)
    train(optimizer, range(2))
    before = {p: (p.detach().clone(), optimizer.state[p][EXP_AVG].clone()) for p in (x, y, fused)}
    for p in (x, y, fused):
        p.grad = torch.randn_like(p)
    x.grad[2, 3] = y.grad[1, 0, 0] = fused.grad[7, 1] = bad
    optimizer.step()
    for p in (x, fused):
        assert torch.equal(p, before[p][0]) and torch.equal(optimizer.state[p][EXP_AVG], before[p][1])
    assert torch.equal(y[1], before[y][0][1]) and torch.equal(optimizer.state[y][EXP_AVG][1], before[y][1][1])
    assert not torch.equal(y[0], before[y][0][0])
    train(optimizer, range(3, 5))
    assert all(p.isfinite().all() and not torch.equal(p, before[p][0]) for p in (x, y, fused))


def test_the_soft_phase_begins_although_every_gradient_is_nan():
    """The temperature is m's, which is always finite: here of zeros, so tau stays at its highest."""
    x = matrices([(6, 4)])[0]
    optimizer = SoftMuon([x], LR, sign_iters=0, transition_iters=4)
    x.grad = torch.full_like(x, math.nan)
    optimizer.step()
    assert optimizer.schedule[:2] == (0.0, 0.0) and optimizer.tau == 1e9
    train(optimizer, [1])
    assert x.isfinite().all()


def test_a_state_that_is_not_finite_is_one_line_where_the_soft_phase_begins():
    """Incident: torch's svdvals raised three lines about convergence, on the rank that had the matrix alone."""
    x = matrices([(6, 4)])[0]
    optimizer = SoftMuon([x], LR, sign_iters=1, transition_iters=4)
    train(optimizer, [0])
    optimizer.state[x][EXP_AVG][0, 0] = math.nan
    with pytest.raises(S3Error, match="an m is not finite: the soft phase cannot begin") as caught:
        train(optimizer, [1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "bad"), [("beta", 1.5), ("lr", math.nan), ("weight_decay", -0.1)])
def test_a_value_that_a_callback_wrote_is_looked_at(name, bad):
    """In the second group: the first had moved before the step was refused."""
    params = matrices()
    before = [param.detach().clone() for param in params]
    optimizer = SoftMuon([{"params": params[:1]}, {"params": params[1:]}], LR, DECAY, soft_start=1)
    optimizer.param_groups[1][name] = bad
    with pytest.raises(S3Error, match=f"{name} is {bad}"):
        train(optimizer, [0])
    assert same(params, before)


@pytest.mark.parametrize("saved_at", [2, 4, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_in_both_phases_changes_no_bit(tmp_path, saved_at, dtype):
    """Hard until step 4, soft until 10; bfloat16 weights keep a float32 m."""

    def make():
        params = matrices(dtype=dtype)
        return params, SoftMuon(params, LR, weight_decay=DECAY, total_steps=10, soft_start=0.4)

    whole, straight = make()
    train(straight, range(10))
    first, optimizer = make()
    train(optimizer, range(saved_at))
    torch.save({"params": first, "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    params, resumed = make()
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    for x, y in zip(params, loaded["params"], strict=True):
        x.data.copy_(y.data)
    resumed.load_state_dict(loaded["optimizer"])
    train(resumed, range(saved_at, 10))
    assert same(whole, params)
    assert all(state[EXP_AVG].dtype == torch.float32 for state in resumed.state.values())
    twin = copy.deepcopy(straight)
    assert twin.tau == straight.tau and straight.tau < 1e9


def test_another_length_at_a_resume_counts_in_the_hard_phase_and_not_in_the_soft_one(caplog):
    params = matrices()
    optimizer = SoftMuon(params, LR, total_steps=10, soft_start=0.4)
    train(optimizer, range(2))
    longer = SoftMuon(matrices(), LR, total_steps=20, soft_start=0.4)
    longer.load_state_dict(optimizer.state_dict())
    assert (longer.param_groups[0]["sign_iters"], longer.param_groups[0]["steps_taken"]) == (8, 2)
    train(optimizer, range(2, 6))
    longer.load_state_dict(optimizer.state_dict())
    assert longer.tau == optimizer.tau
    assert "saved in its soft phase" in caplog.text


def test_other_settings_of_the_map_are_one_line_and_the_saved_ones_count(caplog):
    """As with all of torch's optimizers; of how the state was stepped nothing was said."""
    saved = SoftMuon([{"params": matrices([(6, 4)]), "qkv_split_shapes": (1, 1, 1)}], LR, soft_start=1, num_ns_steps=7)
    other = SoftMuon(matrices([(6, 4)]), LR, soft_start=1, scale_mode="shape_scaling")
    other.load_state_dict(saved.state_dict())
    (line,) = [message for message in caplog.messages if "the saved values count" in message]
    for part in ("scale_mode=spectral", "num_ns_steps=7", "qkv_split_shapes=(1, 1, 1)", "scale_mode=shape_scaling"):
        assert part in line
    (group,) = other.param_groups
    assert (group["scale_mode"], group["num_ns_steps"], group["qkv_split_shapes"]) == ("spectral", 7, (1, 1, 1))


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"maximize": True}], ids=str)
def test_what_is_counted_is_what_moved_the_weights(settings):
    """In float64, with weight decay, in both phases; a matrix with a broken gradient does not move. The numbers were of
    S3 alone, which moves the rest. The map is float32, so sums agree to 1e-6."""
    params = matrices(dtype=torch.float64)
    optimizer = SoftMuon(params, LR, weight_decay=DECAY, total_steps=8, soft_start=0.5, **settings)
    optimizer.update_statistics = statistics.zeros()
    for step in range(8):
        before = [param.detach().clone() for param in params]
        for i, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * i + step)
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.1
        params[2].grad[3, 1] = math.nan
        optimizer.step()
        moved = [(a - b) / LR - DECAY * a for a, b in zip(before, params, strict=True)]
        moved[2] = torch.zeros_like(moved[2])
        u, gradient = (torch.cat([each.detach().flatten() for each in x]) for x in (moved, [p.grad for p in params]))
        agreeing = (u * gradient * (-1 if settings.get("maximize") else 1) > 0).sum()
        total, largest, saturated, agreement, elements = optimizer.update_statistics.tolist()
        assert total == pytest.approx(u.abs().sum().item(), rel=1e-6)
        assert largest == pytest.approx(u.abs().max().item(), rel=1e-6)
        assert math.isnan(saturated), "an entry has no bound to be near to"
        assert (agreement, elements) == (agreeing, u.numel())


def test_a_step_within_a_compiled_one_is_the_same():
    compiled, plain = matrices(), matrices()
    optimizers = [SoftMuon(x, LR, weight_decay=DECAY, total_steps=6, soft_start=0.5) for x in (compiled, plain)]

    @torch.compile(backend="eager")
    def step(optimizer):
        optimizer.step()

    for i in range(6):
        for params in (compiled, plain):
            for x in params:
                x.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        step(optimizers[0])
        optimizers[1].step()
    assert same(compiled, plain) and optimizers[0].schedule == optimizers[1].schedule


def test_weights_of_half_and_double_precision():
    """Moved in float32, rounded once: the weight is the float32 run's, rounded. Double has an m in double."""
    half, single = matrices(dtype=torch.bfloat16), matrices(dtype=torch.bfloat16)
    single = [x.detach().float().requires_grad_() for x in single]
    for params in (half, single):
        optimizer = SoftMuon(params, LR, weight_decay=DECAY, soft_start=1)
        for i, x in enumerate(params):
            x.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).bfloat16().to(x.dtype)
        optimizer.step()
    assert same(half, [x.bfloat16() for x in single])
    double = matrices(dtype=torch.float64)
    optimizer = SoftMuon(double, LR, weight_decay=DECAY, soft_start=1)
    train(optimizer, range(2))
    assert all(state[EXP_AVG].dtype == torch.float64 for state in optimizer.state.values())


def test_maximize_turns_the_step_around_and_a_tensor_rate_is_a_rate():
    down, up, tensor = matrices(), matrices(), matrices()
    train(SoftMuon(down, LR, weight_decay=0.0, soft_start=1), range(1))
    train(SoftMuon(up, LR, weight_decay=0.0, soft_start=1, maximize=True), range(1))
    train(SoftMuon(tensor, torch.tensor(LR, dtype=torch.float64), weight_decay=0.0, soft_start=1), range(1))
    for a, b, c, start in zip(down, up, tensor, matrices(), strict=True):
        torch.testing.assert_close(a - start, start - b, rtol=0, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)


def test_a_matrix_without_a_gradient_stays_and_strides_do_not_matter():
    x, y = matrices([(6, 4), (6, 4)])
    turned = nn.Parameter(y.detach().mT.contiguous().mT)
    idle = matrices([(3, 3)])[0]
    before = idle.detach().clone()
    for params in ([x, idle], [turned]):
        optimizer = SoftMuon(params, LR, weight_decay=DECAY, sign_iters=1, transition_iters=4)
        params[0].data.copy_(y.data)
        for step in range(4):
            params[0].grad = torch.randn((6, 4), generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(idle, before)
    torch.testing.assert_close(x, turned, rtol=0, atol=BF16 * 4 * LR * 0.2 * 6**0.5)  # products in another order
