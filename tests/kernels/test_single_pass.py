"""What one pass does besides the update, on every kernel of the CPU: dtypes, scale, flags, statistics."""

import itertools

import pytest
import torch
from torch import Tensor

from s3_megatron.kernels.cpu import library
from s3_megatron.optim.reference import s3_reference_step
from tests.kernels.by_keyword import cpu, foreach
from tests.kernels.kernels import KERNELS, cpp

HYPER = {"lr": 0.1, "beta1": 0.95, "beta2": 0.95, "p": 3.0, "weight_decay": 0.1, "nesterov": True}
WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS)
# Lengths round a register, round several, and a long one that ends in the middle of one.
SIZES = [0, 1, 15, 16, 17, 63, 64, 65, 4097]


def problem(size: int, dtypes=(WIDE, WIDE, WIDE), *, seed: int = 0) -> list[list[Tensor]]:
    """Weights, gradients, m and r as some ordinary steps leave them; sizes from tiny to large within a tensor."""
    generator = torch.Generator().manual_seed(seed)
    param, grad, state = dtypes

    def draw() -> Tensor:
        return torch.randn(size, generator=generator)

    r = draw().abs() + 0.1
    m = r * (draw() / 3).clamp(-1, 1)
    scale = 10.0 ** (draw() * 2).clamp(-3, 3)
    return [[x] for x in (draw().to(param), (draw() * scale).to(grad), (m * scale).to(state), (r * scale).to(state))]


def copies(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[x.clone() for x in column] for column in columns]


def bits(columns: list[list[Tensor]]) -> list[bytes]:
    return [x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for column in columns for x in column]


@EVERY_KERNEL
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
@pytest.mark.parametrize("state", [WIDE, BRAIN])
def test_every_dtype_rounds_the_oracles_result_once(kernel, state, p):
    """float32 states: 8 units of 2^-24 of rounding (6 measured with margin, see test_oracle), on top of the one
    rounding to what is stored. The model's weight is the new weight's nearest, whatever that weight is."""
    for size, param, grad, model, nesterov in itertools.product(
        (17, 4097), (WIDE, BRAIN, HALF), (WIDE, BRAIN, HALF), (None, BRAIN, HALF), (True, False)
    ):
        columns = problem(size, (param, grad, state))
        (x,), (g,), (m,), (r,) = copies(columns)
        models = [] if model is None else [torch.full((size,), 7.0, dtype=model)]
        rate = {**HYPER, "p": p, "nesterov": nesterov}
        KERNELS[kernel](*columns, **rate, model_params=models)
        want_x, want_m, want_s, update = s3_reference_step(x.double(), g.double(), m.double(), r.double() ** p, **rate)
        want_r = want_s ** (1 / p)
        unit = 8 * 2**-24
        within(columns[2][0], want_m, unit * want_r)
        within(columns[3][0], want_r, unit * want_r)
        within(columns[0][0], want_x, 0.1 * unit * (1 + update.abs()) + 2 * x.double().abs() * 2**-24)
        if models and param == WIDE:
            assert torch.equal(models[0], columns[0][0].to(model))


@EVERY_KERNEL
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
@pytest.mark.parametrize("size", [*SIZES, 1_000_003])
def test_every_size_is_the_oracles(kernel, size, p):
    """Tolerance as above; the weight's change must be the oracle's in every element, the last one included."""
    columns = problem(size)
    (x,), (g,), (m,), (r,) = copies(columns)
    KERNELS[kernel](*columns, **{**HYPER, "p": p})
    rate = {**HYPER, "p": p}
    want_x, want_m, want_s, _ = s3_reference_step(x.double(), g.double(), m.double(), r.double() ** p, **rate)
    want_r, unit = want_s ** (1 / p), 8 * 2**-24
    within(columns[2][0], want_m, unit * want_r)
    within(columns[3][0], want_r, unit * want_r)
    within(columns[0][0], want_x, 0.2 * unit + 2 * x.double().abs() * 2**-24)


def within(actual: Tensor, wanted: Tensor, tolerance: Tensor) -> None:
    kept = torch.finfo(actual.dtype)
    rounding = wanted.abs() * kept.eps / 2 * 1.001 + kept.smallest_normal * kept.eps
    assert ((actual.double() - wanted).abs() <= tolerance + rounding).all()


@pytest.mark.parametrize("kernel", library.loops())
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_every_16_bit_number_is_read_and_written_as_torch_does(kernel, dtype):
    """All 65,536 as weights under a rate of 0, and a million random float32 bit patterns as masters of a model.

    Incident: AVX-512's own conversion to bfloat16 takes subnormal numbers for 0, and a weight whose gradient was broken
    lost its bits.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x, zeros = every.clone(), torch.zeros(2**16)
    rate = {**HYPER, "lr": 0.0, "weight_decay": 0.1}
    KERNELS[kernel]([x], [zeros.clone()], [zeros.clone()], [zeros.clone()], **rate)
    finite = every.isfinite()  # 0 * inf is NaN; and -0 - 0 is -0, so bits are compared
    assert torch.equal(x[finite].view(torch.int16), every[finite].view(torch.int16))

    generator = torch.Generator().manual_seed(0)
    master = torch.randint(-(2**31), 2**31, (1_000_003,), generator=generator, dtype=torch.int64).int().view(WIDE)
    # Round about float16's range, which random bits seldom meet.
    master[::2] = torch.randn(500_002, generator=generator) * 2.0 ** torch.randint(-26, 18, (500_002,)).float()
    master[master.isnan()] = torch.inf
    broken = torch.full_like(master, torch.nan)
    model = torch.zeros(master.shape, dtype=dtype)
    KERNELS[kernel]([master], [broken], [broken.clone()], [broken.clone()], **rate, model_params=[model])
    assert torch.equal(model.view(torch.int16), master.to(dtype).view(torch.int16))


@EVERY_KERNEL
def test_the_scale_is_a_multiplication_of_the_gradient_and_maximize_its_sign(kernel):
    """By 2^-7, which is exact: not a bit may differ."""
    one, other = problem(4097), problem(4097)
    other[1][0] *= -(2.0**7)
    KERNELS[kernel](*one, **HYPER)
    KERNELS[kernel](*other, **HYPER, scale=torch.tensor([2.0**-7]), maximize=True)
    assert bits([one[0], one[2], one[3]]) == bits([other[0], other[2], other[3]])


@EVERY_KERNEL
def test_found_inf_makes_the_step_do_nothing(kernel):
    columns, model = problem(65), [torch.full((65,), 7.0, dtype=BRAIN)]
    columns[1][0][3] = torch.inf
    before, statistics = bits([*columns, model]), torch.zeros(5, dtype=torch.float64)
    rest = {**HYPER, "model_params": model, "statistics": statistics}
    KERNELS[kernel](*columns, **rest, found_inf=torch.ones(1))
    assert bits([*columns, model]) == before and not statistics.any()
    KERNELS[kernel](*columns, **rest, found_inf=torch.zeros(1))
    assert all(old != new for i, (old, new) in enumerate(zip(before, bits([*columns, model]), strict=True)) if i != 1)
    assert statistics[4] == 65


@EVERY_KERNEL
def test_statistics_are_those_of_the_update(kernel):
    columns = problem(10_007)
    columns[1][0][:100] = torch.nan
    x = columns[0][0] = torch.zeros(10_007)  # so that the new weight is the update
    statistics = torch.zeros(5, dtype=torch.float64)
    KERNELS[kernel](*columns, **{**HYPER, "lr": 1.0}, statistics=statistics)
    update, agreeing = x.double().abs(), (x.sign() * columns[1][0].sign() < 0).sum()
    expected = torch.stack([update.sum(), update.max(), (update > 0.9).sum(), agreeing, torch.tensor(10_007)])
    # Sums of 1,024 float32 numbers at a time: half a unit each.
    torch.testing.assert_close(statistics, expected.double(), rtol=2**-18, atol=0)
    assert 0 < statistics[2] < statistics[3] < 10_007


@EVERY_KERNEL
def test_rows_at_odd_addresses_and_with_strides_are_like_any_other(kernel):
    """Slices that start one element late are at no multiple of anything; a transposed weight has other strides."""
    for size in SIZES:
        columns = problem(size + 1, (WIDE, BRAIN, BRAIN))
        plain = [[column[0][1:].clone()] for column in columns]
        KERNELS[kernel](*[[column[0][1:]] for column in columns], **HYPER)
        KERNELS[kernel](*plain, **HYPER)
        assert bits([[column[0][1:]] for column in columns]) == bits(plain)
    plain = problem(6 * 35)
    odd = [[column[0].clone().view(35, 6).t()] for column in plain]
    KERNELS[kernel](*plain, **HYPER)
    KERNELS[kernel](*odd, **HYPER)
    assert bits([[column[0].t().reshape(-1)] for column in odd]) == bits(plain)


@pytest.mark.parametrize("kernel", library.loops())
@pytest.mark.parametrize("state", [WIDE, BRAIN])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
def test_no_sharding_and_no_number_of_threads_changes_a_bit(kernel, state, p):
    """Copies of the loop for usual and for unusual settings, and ends of rows, must round alike."""
    size = 70_001
    whole = problem(size, (WIDE, WIDE, state))
    start, rate = copies(whole), {**HYPER, "p": p}
    KERNELS[kernel](*whole, **rate)
    cuts = [0, 1, 17, 1000, 33_333, 33_334, 65_537, size]
    shards = [[x[a:b] for a, b in itertools.pairwise(cuts)] for (x,) in copies(start)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        cpu.s3_step_(
            *shards, lr=torch.tensor(0.1), **{k: v for k, v in rate.items() if k != "lr"}, loop=loop_of(kernel)
        )
        torch.set_num_threads(1)
        alone = copies(start)
        KERNELS[kernel](*alone, **rate, model_params=[torch.zeros(size, dtype=HALF)])
    finally:
        torch.set_num_threads(threads)
    assert bits([[torch.cat(column)] for column in shards]) == bits(whole) == bits(alone)


@pytest.mark.parametrize("state", [WIDE, BRAIN])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
def test_the_vector_loops_agree_to_the_bit(state, p):
    """AVX-512 and AVX2 do the same operations in the same order, so a job may move between such machines."""
    names = [name for name in library.loops() if name != "portable"]
    results = []
    for name in names:
        columns = problem(4099, (WIDE, WIDE, state))
        for _ in range(3):
            KERNELS[name](*columns, **{**HYPER, "p": p})
        results.append(bits(columns))
    assert all(result == results[0] for result in results)


def loop_of(kernel: str) -> int:
    return library.loops().index(kernel)


@EVERY_KERNEL
def test_stochastic_rounding_is_right_on_average_and_repeats_with_its_seed(kernel):
    """Between two neighbours of bfloat16 at 30% of the way, the upper one must be taken 30% of the times.

    2^18 elements: the share's standard deviation is 0.0009; five of them are allowed, once for m and once for r.
    Without a seed all would be rounded alike, and the share 0 or 1.
    """
    size = 2**18
    # Constant gradient and state with m = r = g: both stay what they are, 1 + 0.3/128, in every form.
    value = 1 + 0.3 / 128
    start = [[torch.zeros(size)], [torch.full((size,), value)], *([torch.full((size,), value).to(BRAIN)] for _ in "mr")]

    def run(seed: int) -> list[list[Tensor]]:
        columns = copies(start)
        KERNELS[kernel](*columns, **{**HYPER, "beta1": 0.0, "beta2": 0.0, "p": 1.0}, rounding_seed=torch.tensor(seed))
        return columns

    columns = run(3)
    up = [column[0] > 1 for column in columns[2:]]
    for share in up:
        assert abs(share.double().mean() - 0.3) < 5 * 0.0009
    # Noise of m and of r, of one seed and the next, must not be related: shares of a product are products.
    other = [column[0] > 1 for column in run(4)[2:]]
    for a, b in ((up[0], up[1]), (up[0], other[0]), (up[1], other[1])):
        assert abs((a & b).double().mean() - 0.09) < 5 * 0.0006
    assert bits(run(3)) == bits(columns)


@pytest.mark.parametrize("kernel", library.loops())
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
def test_a_bfloat16_state_that_is_nan_stays_nan(kernel, seed, p):
    """States are rounded without a look at NaN: a carry into its exponent would make a number of a broken state.

    All 254 patterns of NaN, in m and in r, among sound elements.
    """
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BRAIN)
    broken = patterns[patterns.isnan()]
    columns = problem(1024, (WIDE, WIDE, BRAIN))
    columns[2][0][: len(broken)] = broken
    columns[3][0][-len(broken) :] = broken
    was_nan = [column[0].isnan() for column in columns[2:]]
    noise = None if seed is None else torch.tensor(seed)
    KERNELS[kernel](*columns, **{**HYPER, "p": p}, rounding_seed=noise)
    assert [bool(nan.any()) for nan in was_nan] == [True, True]
    for column, nan in zip(columns[2:], was_nan, strict=True):
        assert torch.equal(column[0].isnan(), nan)


@EVERY_KERNEL
@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_flush_to_zero_changes_no_more_than_denormals(kernel, p):
    """With flush-to-zero on, as some programs set it, no NaN may appear; what is not denormal moves as ever."""
    columns = problem(4096)
    columns[1][0][::3] = 1e-40
    columns[2][0][::2], columns[3][0][::2] = 3e-39, 1e-38
    columns[3][0][::6] = 0.0
    plain = copies(columns)
    KERNELS[kernel](*plain, **{**HYPER, "p": p})
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals to zero")
    try:
        KERNELS[kernel](*columns, **{**HYPER, "p": p})  # so few elements stay on this thread, whose mode it is
    finally:
        torch.set_flush_denormal(False)
    for old, new in zip(plain, columns, strict=True):
        assert new[0].isfinite().all()
        ordinary = plain[3][0] > 1e-30
        torch.testing.assert_close(new[0][ordinary], old[0][ordinary], rtol=1e-6, atol=1e-37)


def test_ten_thousand_steps_with_bfloat16_states_stay_with_float32():
    """Noise of one standard deviation about a drift of 0.3, over 20,000 weights: many steps in which to go wrong.

    m's rounding, up to 2^-9 of its size a step, is forgotten in 20 steps, so that a step's update is off by about
    2^-9 * sqrt(20) / 2 = 0.4% of |u|, with either sign, and by as much for r's; |u| is 0.3, errors are alike for 20
    steps, and 10,000 steps add up to 0.006 * 0.3 * sqrt(20 * 10,000) = 0.8 rates a weight (1.5 measured). Thrice that
    is allowed, and for the mean over all weights a thousandth of the way they went: a bias of 1% in m or r would be
    ten times as much. A mean of 20,000 is known to 0.011 rates, a fiftieth of what is allowed.
    """
    size, steps = 20_003, 10_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * size, generator=generator).add_(0.3).to(BRAIN)
    starts = torch.randint(size, (steps,), generator=generator).tolist()  # another piece of it at every step
    run = {dtype: [torch.zeros(size), *torch.zeros(2, size, dtype=dtype)] for dtype in (WIDE, BRAIN)}
    rest = {**HYPER, "weight_decay": 1e-5, "lr": torch.tensor(1.0)}
    for start in starts:
        for x, m, r in run.values():
            cpu.s3_step_([x], [noise[start : start + size]], [m], [r], **rest)
    way, difference = run[WIDE][0].mean().abs(), (run[BRAIN][0] - run[WIDE][0]).double()
    spread = difference.std()
    print(f"bfloat16 states, 10,000 steps: {way:.0f} rates, off by {difference.mean():.3f} +- {spread:.3f}")
    assert abs(difference.mean()) < 0.001 * way
    assert spread < 2.4


def test_a_step_allocates_nothing_of_a_tensors_size():
    """torch's own allocations, counted by its profiler; foreach's, counted the same way, show that it counts."""

    def allocated(kernel) -> int:
        columns, statistics = problem(100_003), torch.zeros(5, dtype=torch.float64)
        with torch.profiler.profile(profile_memory=True) as profile:
            kernel(*columns, **HYPER, statistics=statistics)
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    assert allocated(cpp(0)) < 1024
    assert allocated(foreach.s3_step_) > 100_003 * 4
