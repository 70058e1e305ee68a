"""SoftSignum on a real GPU: its Triton step, and the optimizer through both phases; a small part in the interpreter."""

import logging
import math
from typing import Any

import pytest
import torch

from s3_megatron.kernels import op
from s3_megatron.kernels.call import Step
from s3_megatron.optim import EXP_AVG, SoftSignum
from tests.gpu.card import DEVICE, REAL, allocations, capture, needs_triton, never_waiting, size
from tests.gpu.problems import ALL_F32, BF16, ENGINE, F16, SIZES, changing_settings, on_device
from tests.kernels.by_keyword import foreach
from tests.kernels.triton.soft_oracle import SoftProblem, check

if not REAL and needs_triton.args[0] is False:
    from tests.kernels.triton.conversions import exact_conversions  # noqa: F401  (of every test here)

pytestmark = [pytest.mark.gpu, needs_triton]

INF = math.inf


@pytest.mark.parametrize("tau", [INF, 5.0, 1e9])
@pytest.mark.parametrize("types", [ALL_F32, ENGINE, ALL_F32 | {"grad": F16, "model": F16}, ENGINE | {"param": F16}])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_step_is_the_oracles(types, tau, nesterov):
    """8 units, since compiled divisions are good to 2 ulp only."""
    settings = {"scale": on_device(0.75), "found_inf": on_device(0.0), "maximize": True}
    before = SoftProblem.of(SIZES, tau=tau, nesterov=nesterov, **settings, **types)
    check(before, before.step(), units=8)


@pytest.mark.parametrize("tau", [INF, 5.0])
def test_found_inf_changes_nothing(tau):
    statistics = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    problem = SoftProblem.of(SIZES, tau=tau, found_inf=on_device(1.0), statistics=statistics, **ENGINE)
    assert problem.step().bits() == problem.bits()
    assert not statistics.any()


def test_no_update_is_longer_than_one_and_statistics_are_its():
    """u is what leaves a weight of 0 at rate 1; a compiled division of equals must not exceed 1."""
    for tau in (INF, 3.0, 1e9):
        statistics = torch.zeros(5, dtype=torch.float64, device=DEVICE)
        before = SoftProblem.of((size(100_003, 3003),), tau=tau, statistics=statistics, **ALL_F32)
        before.params[0].zero_()
        before.exp_avgs[0].nan_to_num_()
        before.settings["lr"] = torch.tensor(1.0)
        u = -before.step().params[0].double()
        assert u.abs().max() == 1.0
        # Float32 sums of 1,024 numbers, in float64 from there.
        torch.testing.assert_close(statistics[0], u.abs().sum(), rtol=2e-6, atol=0)
        agree = (u * before.grads[0].double() > 0).sum()
        assert statistics[1:].tolist() == [1.0, (u.abs() > 0.9).sum().item(), agree.item(), len(u)]


def test_the_same_bits_however_a_row_is_aligned():
    for tau in (INF, 5.0):
        whole = SoftProblem.of((4100,), tau=tau, **ALL_F32)
        odd = whole.clone()
        for column in (odd.params, odd.grads, odd.exp_avgs):
            column[0] = torch.cat([column[0][:1], column[0]])[1:]  # one element off 16 bytes
        assert odd.params[0].data_ptr() % 16
        whole.move()
        odd.move()
        assert whole.bits() == odd.bits()


def test_nothing_synchronises_or_allocates():
    for tau in (INF, 5.0):
        problem = SoftProblem.of(SIZES, tau=tau, **changing_settings(), **ENGINE)
        problem.move()
        before = allocations()
        with never_waiting():
            for _ in range(5):
                problem.settings["tau"] = min(tau, problem.settings["tau"] / 1.5)
                problem.move()
        assert allocations() == before


def test_a_captured_step_follows_its_tensors():
    """Rate, scale, found_inf and the seed change between replays; the temperature is the captured step's."""
    for tau in (INF, 5.0):
        graphed = SoftProblem.of(SIZES, tau=tau, **changing_settings(), **ENGINE)
        eager = graphed.clone()
        eager.settings = {k: v.clone() if torch.is_tensor(v) else v for k, v in graphed.settings.items()}
        for problem in (graphed, eager):
            problem.move()  # compiles, and makes the table
        replay = capture(graphed.move)
        for lr, scale, found_inf, seed in [(0.5, 0.25, 0.0, 2), (0.1, 1.0, 1.0, 3), (0.2, 2.0, 0.0, 4)]:
            for problem in (graphed, eager):
                problem.settings["lr"].fill_(lr)
                problem.settings["scale"].fill_(scale)
                problem.settings["found_inf"].fill_(found_inf)
                problem.settings["rounding_seed"].fill_(seed)
            replay()
            eager.move()
            assert graphed.bits() == eager.bits()


def test_many_tensors_are_those_of_foreach():
    """One step of the same float32 formula in another order: a few roundings of m, on which a slope of tau acts."""
    problem = SoftProblem.of([1 + 37 * i % 999 for i in range(size(5000, 50))], tau=5.0, **ALL_F32)
    after = problem.step()
    foreach.softsignum_step_(problem.params, problem.grads, problem.exp_avgs, **problem.settings)
    for ours, theirs in zip(after.params, problem.params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)


def trained(device: str, waits_never: bool = False, **settings: Any) -> SoftSignum:
    """Ten steps, the sixth the first soft one, whose end takes the medians and waits."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in (1, 15, 1025, 4099)]
    optimizer = SoftSignum(params, lr=0.1, weight_decay=0.1, total_steps=10, soft_start=0.5, **settings)
    optimizer.update_statistics = torch.zeros(5, dtype=torch.float64, device=device)
    for step in range(10):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.next_step = Step(factor=torch.ones((), device=device))
        if waits_never and step not in (0, 5, 6):  # the first of a kind compiles
            with never_waiting():
                optimizer.step()
        else:
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("settings", [{}, {"nesterov": True}, {"state_dtype": BF16, "rounding_seed": 3}], ids=str)
def test_a_run_through_both_phases_is_the_cpus(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Without noise: m's roundings, 1e-7 of it, move a soft update by tau, at most 110 from the second soft step on, of
    them, at a rate of .1: 1e-6 a step, and 1e-5 with room. With noise, which has other bits there, it runs."""
    op._announce.cache_clear()
    op.choose.cache_clear()
    with caplog.at_level(logging.INFO):
        ours = trained(DEVICE, waits_never=True, **settings)
    assert f"SoftSignum steps on {DEVICE} by kernel {'triton' if REAL else 'cpu'}" in caplog.text
    theirs = trained("cpu", **settings)
    assert ours.update_statistics is not None and ours.update_statistics[4] == theirs.update_statistics[4] == 5140
    if "rounding_seed" in settings:
        return
    assert ours.tau == pytest.approx(theirs.tau, rel=1e-5)
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.state[a][EXP_AVG].cpu(), theirs.state[b][EXP_AVG], rtol=0, atol=1e-6)
