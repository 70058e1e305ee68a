"""The temperature of a soft sign: quantiles, schedule, phases, and the medians it begins with."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.optim.pooled_median import median_and_deviation
from s3_megatron.optim.softsignum_reference import reference_temperature
from s3_megatron.optim.temperature import REACHES, Schedule, folded_cauchy_quantile, phases

# (mu, sigma, p): quantile, computed elsewhere.
QUANTILES = {
    (1e-4, 5e-5, 0.1): 3.632712640026804e-05,
    (1e-4, 5e-5, 0.5): 1.118033988749895e-04,
    (2e-3, 1e-3, 0.9): 6.881909602355865e-03,
    (1, 0.25, 0.999): 1.591610951191259e02,
    (0, 1, 0.25): 0.41421356237309503,
    (1e-4, 2e-4, 0.1): 3.9356748174320309e-5,
    (3e-5, 1e-4, 0.9): 6.327627529769521e-4,
    (-1e-6, 8e-5, 0.75): 1.9314150432091665e-4,
    (2, 0.5, 0.3): 1.7300433352035891,
    (0.5, 0.1, 0.999): 63.665851619025339,
}
# (mu, sigma, p): tau of tanh at eps 1e-4, computed elsewhere. The last is cut from .0778.
TAUS = {
    (0, 1, 0.25): 11.95450663,
    (1e-4, 2e-4, 0.1): 125816.2578,
    (3e-5, 1e-4, 0.9): 7825.553499,
    (-1e-6, 8e-5, 0.75): 25637.77678,
    (2, 0.5, 0.3): 2.862193492,
    (0.5, 0.1, 0.999): 1.0,
}


@pytest.mark.parametrize(("given", "expected"), QUANTILES.items())
def test_quantiles_are_the_golden_ones(given: tuple[float, float, float], expected: float) -> None:
    """To 1e-14: a dozen roundings of float64."""
    assert folded_cauchy_quantile(*given) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.499, 0.5, 0.501, 0.9, 0.999])
@pytest.mark.parametrize(("mu", "sigma"), [(0.0, 1.0), (3.0, 0.01), (-1e-6, 8e-5), (1e-200, 2e-200), (1e30, 1e27)])
def test_a_quantiles_share_of_the_distribution_is_p(mu: float, sigma: float, p: float) -> None:
    """By the distribution function. 1e-12: where mu is 1,000 sigma a rounding of q is 1e-13 of p."""
    q = folded_cauchy_quantile(mu, sigma, p)
    share = (math.atan((q - mu) / sigma) + math.atan((q + mu) / sigma)) / math.pi
    assert share == pytest.approx(p, rel=1e-12, abs=1e-12)


def test_quantiles_without_width() -> None:
    """All of a point's mass is at |mu|; at p = 0 the quantile is 0, by definition; of nothing it is 0."""
    assert [folded_cauchy_quantile(-2.0, 0.0, p) for p in (0.0, 0.25, 0.5, 0.75)] == [0.0, 2.0, 2.0, 2.0]
    assert folded_cauchy_quantile(0.0, 0.0, 0.7) == 0.0


def test_where_the_maps_are_eps_below_one() -> None:
    """To 1e-13, and for an eps that 1 - eps does not show."""
    assert REACHES["tanh"](1e-4) == pytest.approx(4.951718775643098, rel=1e-13)
    assert REACHES["algebraic"](1e-4) == pytest.approx(70.70537470731932, rel=1e-12)
    assert REACHES["tanh"](1e-20) == pytest.approx(math.log(2e20) / 2, rel=1e-13)


@pytest.mark.parametrize(("given", "expected"), TAUS.items())
def test_temperatures_are_the_golden_ones(given: tuple[float, float, float], expected: float) -> None:
    """To 1e-9: they have ten digits. Step 1000 p of 1000 has the quantile p."""
    mu, sigma, p = given
    schedule = Schedule(mu, sigma, 1e-4, 5000, 1000, "tanh")
    assert schedule.tau(5000 + round(1000 * p), 1e9) == pytest.approx(expected, rel=1e-9)


def test_a_schedule_begins_at_tmax_falls_and_stays_at_its_last_value() -> None:
    schedule = Schedule(1e-5, 1e-4, 1e-4, 90, 10, "tanh")
    taus = [schedule.tau(step, 1e9) for step in range(90, 103)]
    assert taus[0] == 1e9 and taus[9:] == [taus[9]] * 4
    assert all(a > b for a, b in itertools.pairwise(taus[:10]))
    assert [schedule.tau(step, 2e4) for step in (90, 91, 99)] == [2e4, 2e4, taus[9]]
    # No distribution at all: the steps stay hard.
    assert Schedule(0.0, 0.0, 1e-4, 90, 10, "tanh").tau(95, 1e9) == 1e9
    assert Schedule(1e-5, 1e-4, 1e-4, 90, 1, "tanh").tau(91, 1e9) == 1e9


def test_the_reference_has_the_same_temperatures() -> None:
    """Medians by torch and a quantile by halving an interval, against histograms and the closed form; rel 1e-12."""
    m = torch.randn(1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-4 + 3e-5
    schedule = Schedule(*median_and_deviation([m]), 1e-4, 0, 8, "tanh")
    for k in range(8):
        assert schedule.tau(k, 1e9) == pytest.approx(reference_temperature(m, k, 8), rel=1e-12)


RUNS = {  # total_steps, soft_start, sign_iters, transition_iters: hard steps, soft steps
    (10_000, 0.9, None, None): (9000, 1000),
    (np.int64(10), 0.5, None, None): (5, 5),
    (10, 0.0, None, None): (0, 10),
    (10, 1.0, None, None): (10, 0),
    (None, 1.0, None, None): (0, 0),
    (None, 0.9, 0, 7): (0, 7),
    (None, 0.9, 90, 10): (90, 10),
    (100, 0.9, 70, None): (70, 30),
    (100, 0.9, 70, 30): (70, 30),
}


@pytest.mark.parametrize(("given", "expected"), RUNS.items())
def test_phases(given: tuple, expected: tuple[int, int]) -> None:
    assert phases(*given) == expected


NAN = float("nan")
BAD = {
    (None, 0.9, None, None): "the length of the run is not known: give total_steps",
    (100, -0.1, None, None): r"soft_start is -0.1: it must lie in \[0, 1\]",
    (100, 1.1, None, None): "soft_start is 1.1",
    (100, NAN, None, None): "soft_start is nan",
    (100, "0.5", None, None): "soft_start is '0.5'",  # a TypeError before
    (100, None, None, None): "soft_start is None",
    ("8", 0.5, None, None): "total_steps is '8': it must be a whole number >= 1",  # read as if 8 were none
    (0, 0.9, None, None): "total_steps is 0: it must be a whole number >= 1",
    (1e4, 0.9, None, None): "total_steps is 10000.0: it must be a whole number",
    (3, 0.9, None, None): "soft_start=0.9 leaves no soft step of total_steps=3",
    (None, 0.9, 90, 0): "transition_iters is 0: it must be a whole number >= 1; soft_start=1 has no soft step",
    (None, 0.9, 90, -5): "transition_iters is -5",
    (None, 0.9, -1, 10): "sign_iters is -1: it must be a whole number >= 0",
    (None, 0.9, None, 10): "transition_iters is 10 without sign_iters",
    (None, 0.9, 90, None): "sign_iters is 90 and total_steps None: no soft step is left",
    (90, 0.9, 90, None): "sign_iters is 90 and total_steps 90",
    (100, 0.9, 90, 20): r"sign_iters \+ transition_iters is 110 and total_steps 100",
}


@pytest.mark.parametrize(("given", "message"), BAD.items())
def test_phases_that_cannot_be_are_refused_in_one_line(given: tuple, message: str) -> None:
    with pytest.raises(S3Error, match=message) as caught:
        phases(*given)
    assert "\n" not in str(caught.value)


def judged(values: list[float], dtype: torch.dtype) -> tuple[float, float]:
    """By Python's own lower median; the deviation rounded as a float32 difference is, where states are not float64."""
    rounded = [float(x) for x in torch.tensor(values, dtype=dtype).double()]
    mu = statistics.median_low(rounded)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    deviations = (torch.tensor(rounded, dtype=wide) - mu).abs().tolist()
    return mu, statistics.median_low(deviations)


TINY = 2.0**-149  # float32's smallest denormal
SAMPLES = {
    "odd": [3.0, -1.0, 2.0, -7.5, 0.25],
    "even": [3.0, -1.0, 2.0, -7.5],
    "one": [-3.25],
    "two": [5.0, -1.0],
    "zeros": [0.0] * 7,
    "signed zeros": [0.0, -0.0, -0.0, 0.0, -0.0],
    "a zero in the middle": [-1.0, -0.0, 1.0],
    "equal": [1e-4] * 6,
    "negative": [-1.0, -2.0, -3.0, -4.0],
    "denormal": [TINY, -TINY, 3 * TINY, 5 * TINY, -2 * TINY],
    "neighbours": [1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.0 + 2**-22, 1.0],
    "far apart": [1e-30, -1e30, 1e30, -1e-30, 1e-38, 7e37],
    "infinite": [float("inf"), 1.0, -float("inf"), 2.0, 3.0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SAMPLES)
def test_medians_are_exact(name: str, dtype: torch.dtype) -> None:
    values = SAMPLES[name]
    parts = [torch.tensor(values[:2], dtype=dtype), torch.empty(0, 3, dtype=dtype)]
    parts += [torch.tensor(x, dtype=dtype) for x in values[2:]]  # of no dimension
    mu, sigma = median_and_deviation(parts)
    assert (mu, sigma) == judged(values, dtype)
    assert not (mu == 0 and math.copysign(1, mu) < 0), "-0 is 0"


def test_medians_of_many_chunks_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, on strided tensors that are cut into pieces of 100."""
    monkeypatch.setattr("s3_megatron.optim.pooled_median._AT_ONCE", 100)
    m = torch.randn(61, 35, generator=torch.Generator().manual_seed(0)).mul_(1e-4).t()
    before = m.clone()
    mu = m.median()
    assert median_and_deviation([m[:20], m[20:]]) == (mu.item(), (m - mu).abs().median().item())
    assert torch.equal(m, before)


def test_a_multiset_that_is_there_several_times_has_the_same_medians() -> None:
    """As where every rank counts its replica of the model."""
    for values, times in itertools.product(SAMPLES.values(), (2, 3, 8)):
        m = torch.tensor(values)
        assert median_and_deviation([m] * times) == median_and_deviation([m])


def test_a_float64_part_makes_all_of_them_float64() -> None:
    fine = torch.tensor([1.0, 1.0 + 2**-40, 1.0 + 2**-41], dtype=torch.float64)
    mu, sigma = median_and_deviation([torch.tensor([0.0, 9.0]), fine])
    assert mu == 1.0 + 2**-41 and sigma == 2**-41


def test_no_element_at_all() -> None:
    assert median_and_deviation([]) == (0.0, 0.0) == median_and_deviation([Tensor(), Tensor(0, 3)])


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"])
def test_ranks_without_a_gpu_count_on_the_host(backend: str | None) -> None:
    """Incident: ``init_process_group()`` names no backend, so the counts went to the accelerator that torch was built
    for, and the first soft step ended in "Found no NVIDIA driver"."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert median_and_deviation([torch.tensor([3.0, -1.0, 2.0])], dist.group.WORLD) == (2.0, 1.0)
    finally:
        dist.destroy_process_group()
