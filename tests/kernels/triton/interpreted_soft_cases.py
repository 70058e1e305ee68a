"""SoftSignum's Triton step in Triton's interpreter; test_numerics.py runs this file with interpreted_cases.py."""

import itertools
import math

import pytest
import torch

from tests.kernels.tanh import check_tanh
from tests.kernels.triton.conversions import exact_conversions  # noqa: F401  (of every test here)
from tests.kernels.triton.soft_oracle import EDGES, SoftProblem, check
from tests.kernels.triton.variants import BF16, F16, F32, SIZES, by_place, with_strides

INF = math.inf
# weight, gradient, state, model weight, as in interpreted_cases.py.
DTYPES = [
    (F32, F32, F32, None),
    (F32, F32, F32, BF16),
    (F32, BF16, BF16, BF16),
    (F32, F16, F32, F16),
    (BF16, BF16, BF16, None),
    (F16, F16, F32, BF16),
]


@pytest.mark.parametrize("tau", [INF, 1e39, 5.0, 1e9])
@pytest.mark.parametrize("types", DTYPES)
def test_a_step_is_the_oracles(types, tau):
    before = with_strides(SoftProblem.of(SIZES, tau=tau, nesterov=types[1] != F16, **by_place(types)))
    check(before, before.step())


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("tau", [INF, 1.0])
def test_other_betas(beta, tau):
    """Below .5 the average goes from the other end."""
    for nesterov in (False, True):
        before = SoftProblem.of((15, 200), beta=beta, tau=tau, nesterov=nesterov, **by_place(DTYPES[0]))
        check(before, before.step())


@pytest.mark.parametrize("tau", [INF, 5.0])
def test_the_oracle_refuses_what_is_too_far(tau):
    """A check that cannot fail is a defect: 64 ulp on one coordinate of each result, and a changed edge."""
    before = SoftProblem.of((200,), tau=tau, **by_place(DTYPES[0]))
    good = before.step()
    check(before, good)
    for column in ("params", "exp_avgs"):
        for at, change in ((100, 2.0**-14), (10, 1e-6)):  # the gradient of 10 is NaN
            bad = good.clone()
            getattr(bad, column)[0][at] += change
            with pytest.raises(AssertionError, match=f"of row 0 at \\[{at}\\]"):
                check(before, bad)


@pytest.mark.parametrize("tau", [1.0, 3.7, 1e4, 1e9])
def test_tanh_is_right_to_a_few_units_in_the_last_place(tau):
    """As the C++ loops' test has it: 3 units, one more where tau * n is itself rounded, odd to the bit, at most 1, and
    0 for 0 alone. From a weight of 0 at rate 1, which leaves -u."""
    y = torch.cat([torch.linspace(0, 12, 20_001), torch.logspace(-45, 37, 10_001), torch.tensor([0.0, 2.0**-149])])
    n = y if tau == 1.0 else torch.cat([y / tau, y])
    updates = []
    for g in (n, -n):
        problem = SoftProblem([torch.zeros_like(n)], [g], [torch.zeros_like(n)])
        problem.settings = {"lr": torch.tensor(1.0), "beta": 0.0, "tau": tau, "weight_decay": 0.0, "nesterov": False}
        updates.append(-problem.step().params[0])
    check_tanh(n, tau, *updates)


def test_maximize_and_scale():
    scale = torch.tensor([2.0**-10 * 1.5])
    for tau in (INF, 5.0):
        before = SoftProblem.of((15, 200), tau=tau, scale=scale, maximize=True, **by_place(DTYPES[2]))
        check(before, before.step())


@pytest.mark.parametrize("tau", [INF, 5.0])
def test_found_inf_is_a_no_op_of_every_store(tau):
    statistics = torch.arange(5, dtype=torch.float64)
    more = {"statistics": statistics, "rounding_seed": torch.tensor([7]), "tau": tau}
    problem = with_strides(SoftProblem.of(SIZES, **more, **by_place(DTYPES[2])))
    for value, stays in [(1.0, True), (float("nan"), True), (0.0, False)]:
        problem.settings["found_inf"] = torch.tensor([value])
        assert (problem.step().bits() == problem.bits()) is stays
        assert (statistics.tolist() == [0, 1, 2, 3, 4]) is stays


@pytest.mark.parametrize("tau", [INF, 2.0])
def test_statistics_are_added_to_and_maxed_into(tau):
    statistics = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64)
    before = SoftProblem.of((15, 16, 17, 1025), tau=tau, statistics=statistics, **by_place(DTYPES[0]))
    for column in before.exp_avgs:
        column.nan_to_num_()
        column[column.abs() < 1e-37] = 0.0  # whose sign is none, and the reference has one
    for column in before.grads:
        column[column.abs() < 1e-37] = 0.0
    before.step()
    u = torch.cat([before.updates(row) for row in range(len(before.params))])
    g = torch.cat(before.grads).double()
    agree = int(((u * g) > 0).sum())
    assert not ((u.abs() - 0.9).abs() < 1e-5).any()  # or the count would hang on rounding
    # Sums of 1,024 float32: 10 levels of a tree, each half an ulp, plus u's own error.
    torch.testing.assert_close(statistics[0].item(), 1 + u.abs().sum().item(), rtol=20 * 2.0**-24, atol=0)
    torch.testing.assert_close(statistics[1].item(), u.abs().max().item(), rtol=8 * 2.0**-24, atol=0)
    assert statistics[2:].tolist() == [1 + int((u.abs() > 0.9).sum()), 1 + agree, 1 + len(u)]


def test_any_sharding_and_alignment_gives_the_same_bits():
    for tau in (INF, 5.0):
        whole = SoftProblem.of((3000,), tau=tau, model=BF16, param=F32, grad=BF16, state=BF16)
        shards = SoftProblem([], [], [], [], settings=whole.settings)
        for begin, end in itertools.pairwise((0, 1, 18, 1042, 1042, 3000)):
            for mine, column in zip(shards.columns, whole.columns, strict=True):
                mine.append(column[0][begin:end].clone())
        stepped, together = shards.step(), whole.step()
        shards.params, shards.exp_avgs, shards.model_params = (
            [torch.cat(column)] for column in (stepped.params, stepped.exp_avgs, stepped.model_params)
        )
        assert shards.bits() == together.bits()


def test_stochastic_rounding_keeps_the_mean():
    """32 seeds x 2,035 equal elements: one rounding has a deviation of at most half an ulp."""
    size, seeds, begin = 2048, 32, len(EDGES)
    before = SoftProblem.of((size,), **by_place((F32, F32, BF16, None)))
    before.grads[0][begin:] = 0.7
    before.exp_avgs[0][begin:] = 0.3
    runs = []
    for seed in range(seeds):
        before.settings["rounding_seed"] = torch.tensor([seed + 2**33])
        runs.append(before.step())
        check(before, runs[-1], steps=1.0)  # up or down, never further
    assert runs[0].bits() != runs[1].bits() and runs[-1].bits() == before.step().bits()
    exact = 0.9 * float(before.exp_avgs[0][-1]) + 0.1 * float(before.grads[0][-1])
    values = torch.stack([run.exp_avgs[0][begin:].double() for run in runs])
    ulp = float(values.max() - values.min())
    assert 2.0**-9 * exact <= ulp <= 2.0**-7 * exact  # two neighbours of bfloat16
    for mean, count in [(values.mean(), values.numel()), (values.mean(0), seeds), (values.mean(1), size - begin)]:
        assert float((mean - exact).abs().max()) < 5.5 * ulp / 2 / count**0.5
