"""The Triton kernel on a real GPU: numerics, streams, graphs, memory; a small part of it in the interpreter."""

import pytest
import torch

from tests.gpu.card import (
    DEVICE,
    REAL,
    allocations,
    capture,
    needs_card,
    needs_triton,
    never_waiting,
    on_a_late_stream,
    size,
)
from tests.gpu.problems import ALL_F32, BF16, ENGINE, F16, F32, SIZES, changing_settings, on_device
from tests.kernels.by_keyword import foreach, triton
from tests.kernels.triton.triton_oracle import Problem, check

if not REAL and needs_triton.args[0] is False:
    from tests.kernels.triton.conversions import exact_conversions  # noqa: F401  (of every test here)

pytestmark = [pytest.mark.gpu, needs_triton]


def _step(problem: Problem) -> None:
    """One step in place."""
    triton.s3_step_(
        problem.params,
        problem.grads,
        problem.exp_avgs,
        problem.exp_avg_roots,
        model_params=problem.model_params,
        **problem.settings,
    )


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
@pytest.mark.parametrize("types", [ALL_F32, ENGINE, ALL_F32 | {"grad": F16, "model": F16}, ENGINE | {"param": F16}])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_step_is_the_oracles(types, p, nesterov):
    """8 units, since compiled divisions are good to 2 ulp only. For other p lg2.approx is good to 2^-22 and ex2.approx
    to 2 ulp (PTX ISA): 24 units in all."""
    settings = {"scale": on_device(0.75), "found_inf": on_device(0.0), "maximize": True}
    before = Problem.of(SIZES, p=p, nesterov=nesterov, **settings, **types)
    check(before, before.step(), units=8 if p in (1, 2, 3) else 24)


def test_twenty_steps_are_those_of_foreach():
    """Each step adds at most a dozen roundings to m and r, which fade; twenty stay within 1e-5 of the weights."""
    ours = Problem.of((1000, size(4097, 40)), **ALL_F32)
    theirs = ours.clone()
    generator = torch.Generator(DEVICE).manual_seed(0)
    for _ in range(20):
        for one, other in zip(ours.grads, theirs.grads, strict=True):
            one.normal_(generator=generator)
            other.copy_(one)
        _step(ours)
        foreach.s3_step_(theirs.params, theirs.grads, theirs.exp_avgs, theirs.exp_avg_roots, **theirs.settings)
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-5, atol=1e-5)


def test_found_inf_changes_nothing():
    statistics = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    problem = Problem.of(SIZES, found_inf=on_device(1.0), statistics=statistics, **ENGINE)
    assert problem.step().bits() == problem.bits()
    assert not statistics.any()


def test_statistics():
    statistics = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    before = Problem.of((size(100_003, 3003),), weight_decay=0.1, statistics=statistics, **ALL_F32)
    before.params[0].zero_()
    before.settings["lr"] = torch.tensor(1.0)
    u = -before.step().params[0].double()
    # Float32 sums of 1,024 numbers, in float64 from there.
    torch.testing.assert_close(statistics[0], u.abs().sum(), rtol=2e-6, atol=0)
    agree = (u * before.grads[0].double() > 0).sum()
    wanted = [u.abs().max().item(), (u.abs() > 0.9).sum().item(), agree.item(), len(u)]
    assert statistics[1:].tolist() == wanted


def test_the_same_bits_however_a_row_is_aligned():
    """And so however it is sharded: both variants are compiled without the compiler's own fusions."""
    whole = Problem.of((4100,), **ALL_F32)
    odd = whole.clone()
    for column in (odd.params, odd.grads, odd.exp_avgs, odd.exp_avg_roots):
        column[0] = torch.cat([column[0][:1], column[0]])[1:]  # one element off 16 bytes
    assert odd.params[0].data_ptr() % 16
    _step(whole)
    _step(odd)
    assert whole.bits() == odd.bits()


def test_stochastic_rounding_keeps_the_mean():
    problem = Problem.of((1 << size(20, 14),), **ENGINE | {"grad": F32})
    problem.exp_avgs[0].fill_(0.3)
    problem.exp_avg_roots[0].fill_(0.6)
    problem.grads[0].fill_(0.7)
    problem.settings["rounding_seed"] = on_device(3, torch.int64)
    after = problem.step()
    m = after.exp_avgs[0].double()
    ulp = float(m.max() - m.min())
    exact = 0.95 * float(problem.exp_avgs[0][0]) + 0.05 * float(problem.grads[0][0])
    assert 0 < ulp <= 2.0**-7 * exact
    assert abs(float(m.mean()) - exact) < 5 * ulp / 2 / m.numel() ** 0.5  # five deviations of the mean
    assert after.bits() == problem.step().bits()


def test_nothing_synchronises_even_with_new_gradients():
    problem = Problem.of(SIZES, **changing_settings(), **ENGINE)
    _step(problem)
    with never_waiting():
        _step(problem)
        problem.grads = [x.clone() for x in problem.grads]
        _step(problem)


def test_a_steady_state_allocates_nothing():
    problem = Problem.of(SIZES, **changing_settings(), **ENGINE)
    _step(problem)
    before = allocations()
    for _ in range(5):
        _step(problem)
    assert allocations() == before


def test_a_captured_step_follows_its_tensors():
    """lr, scale, found_inf and the seed change between replays, as a trainer changes them."""
    graphed = Problem.of(SIZES, **changing_settings(), **ENGINE)
    eager = graphed.clone()
    eager.settings = {k: v.clone() if torch.is_tensor(v) else v for k, v in graphed.settings.items()}
    for problem in (graphed, eager):
        _step(problem)  # compiles, and makes the table
    replay = capture(lambda: _step(graphed))
    # Enough other steps follow to turn the table cache over.
    for i in range(40):
        _step(Problem.of((17 + i,), **ALL_F32))
    for lr, scale, found_inf, seed in [(0.5, 0.25, 0.0, 2), (0.1, 1.0, 1.0, 3), (0.2, 2.0, 0.0, 4)]:
        for problem in (graphed, eager):
            problem.settings["lr"].fill_(lr)
            problem.settings["scale"].fill_(scale)
            problem.settings["found_inf"].fill_(found_inf)
            problem.settings["rounding_seed"].fill_(seed)
        replay()
        _step(eager)
        assert graphed.bits() == eager.bits()


@needs_card
def test_no_new_kernel_when_numbers_change():
    from s3_megatron.kernels.triton import kernel

    problem = Problem.of((1, 16, 1000), **changing_settings(), **ENGINE)
    _step(problem)
    compiled = len(kernel.s3_step.device_caches[torch.cuda.current_device()][0])
    for change in [{"weight_decay": 1.0}, {"beta1": 0.0, "beta2": 0.5}, {"maximize": True}, {"weight_decay": 0.0}]:
        problem.settings |= change
        _step(problem)
    _step(Problem.of((1, 31, 1 << 16), **changing_settings(), **ENGINE))
    assert len(kernel.s3_step.device_caches[torch.cuda.current_device()][0]) == compiled


def test_another_stream_may_use_the_table():
    """A table is copied to the GPU by the stream of its first call; a call of another stream has to wait for that copy.
    The first call here is late, and does nothing to the tensors, or the second would have to wait for these as well.
    Before, the other stream had a table of its own, and began while its problem was still being cloned."""
    problem = Problem.of(SIZES, found_inf=on_device(0.0), **ALL_F32)
    expected = problem.step().bits()
    again, idle = problem.clone(), problem.clone()
    idle.params, idle.exp_avgs, idle.exp_avg_roots = again.params, again.exp_avgs, again.exp_avg_roots
    idle.grads = again.grads
    idle.settings["found_inf"] = on_device(1.0)
    with on_a_late_stream():
        _step(idle)
    _step(again)
    if REAL:
        torch.cuda.synchronize()
    assert again.bits() == expected


def test_five_thousand_tensors():
    problem = Problem.of([1 + 37 * i % 999 for i in range(size(5000, 50))], **ALL_F32)
    after = problem.step()
    foreach.s3_step_(problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_roots, **problem.settings)
    # One step of the same float32 formula in another order; where nothing moves both are exact.
    for ours, theirs in zip(after.params, problem.params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)


@needs_card
def test_more_than_two_to_the_31_elements():
    many = 2**31 + 1041
    if torch.cuda.mem_get_info()[0] < 9 * many:
        pytest.skip(f"needs {9 * many / 2**30:.0f} GiB of GPU memory")
    x, g, m, r = (torch.full((many,), value, dtype=BF16, device=DEVICE) for value in (1.0, 0.5, 0.25, 0.75))
    g[-3:] = torch.tensor([3.0, 4.0, 5.0])
    settings = Problem.of((), **ALL_F32).settings
    small = Problem(*([t[-2000:].clone()] for t in (x, g, m, r)), settings=settings)
    _step(small)
    triton.s3_step_([x], [g], [m], [r], **settings)
    for whole, end in zip((x, m, r), (small.params, small.exp_avgs, small.exp_avg_roots), strict=True):
        assert torch.equal(whole[-2000:], end[0])
        for begin in range(0, many - 2000, 2**28):  # a block at a time: a comparison allocates
            assert bool((whole[begin : min(begin + 2**28, many - 2000)] == end[0][0]).all())
