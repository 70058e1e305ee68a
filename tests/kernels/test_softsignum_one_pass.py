"""SoftSignum's C++ loops: tanh, hostile gradients, threads and shards to the bit, and what goes to foreach."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3_megatron.kernels import cpu, softsignum
from s3_megatron.kernels.call import Columns, SoftRule, Step
from s3_megatron.kernels.cpu import library
from s3_megatron.kernels.op import step_
from s3_megatron.optim.softsignum_reference import softsignum_reference_step
from tests.kernels.by_keyword import columns_of
from tests.kernels.tanh import check_tanh
from tests.tensors import random

INF = math.inf
LOOPS = range(len(library.loops()))
RULE = SoftRule(lr=0.1, beta=0.9, tau=5.0, weight_decay=0.1, nesterov=True)
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
TINY = torch.finfo(torch.float32).tiny


def move(x: Tensor, g: Tensor, m: Tensor, rule: SoftRule, loop: int, seed: int | None = None) -> None:
    cpu.step_(columns_of([x], [g], [m]), rule, Step(seed=None if seed is None else torch.tensor(seed)), loop=loop)


def bits(x: Tensor) -> Tensor:
    """One integer an element, so that NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tau", [1.0, 3.7, 1e4, 1e9])
def test_tanh_is_right_to_a_few_units_in_the_last_place(loop, tau):
    """From a weight of 0 at rate 1, which leaves -u. From m's smallest denormal to where tanh is 1: 3 units (2.5 were
    seen), one more where tau * n is itself rounded, odd to the bit, never above 1, and 0 for 0 alone."""
    y = torch.cat([torch.linspace(0, 12, 200_001), torch.logspace(-45, 38, 100_001), torch.tensor([0.0, 2.0**-149])])
    n = y if tau == 1.0 else torch.cat([y / tau, y])
    updates = []
    for g in (n, -n):
        x = torch.zeros_like(n)
        move(x, g, torch.zeros_like(n), SoftRule(1.0, 0.0, tau, 0.0, False), loop)
        updates.append(-x)
    check_tanh(n, tau, *updates)


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, TINY, -TINY / 2, 2.0**-149, 1e20, -1e37, math.nan, INF, -INF, 3e38]),
    st.floats(-100, 100, width=32),
)


@settings(max_examples=300, derandomize=True)
@given(
    gradients=st.lists(numbers, min_size=1, max_size=70),
    averages=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5),
    beta=st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.999]),
    tau=st.sampled_from([INF, 1e9, 50.0, 1.0, 1e-3]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    loop=st.sampled_from(LOOPS),
)
def test_one_step_is_the_reference_for_any_gradient(gradients, averages, beta, tau, nesterov, maximize, loop):
    """m's own error is 4 roundings of its larger part, twice with a look-ahead; tanh has a slope of at most tau there.
    Gradients that are not finite, or beyond a quarter of the range, keep weight and m bit for bit."""
    g = torch.tensor(gradients)
    m = torch.tensor(averages).repeat(70)[: len(g)].clone()
    x = random(len(g))
    its_x, its_m = x.clone(), m.clone()
    move(its_x, g, its_m, SoftRule(0.1, beta, tau, 0.1, nesterov, maximize), loop)
    broken = ~(g.abs() <= torch.finfo(torch.float32).max / 4)
    assert torch.equal(bits(its_x)[broken], bits(x)[broken]) and torch.equal(bits(its_m)[broken], bits(m)[broken])
    sign = -1.0 if maximize else 1.0
    wide = [t.double()[~broken] for t in (x, sign * g, m)]
    own = {"lr": 0.1, "beta": beta, "tau": tau, "weight_decay": 0.1, "nesterov": nesterov}
    expected, average, _ = softsignum_reference_step(*wide, **own)
    error = 8 * 2.0**-24 * torch.maximum(wide[1].abs(), wide[2].abs()) + 2.0**-148
    assert ((its_m[~broken].double() - average).abs() <= error).all()
    n = beta * average + (1 - beta) * wide[1] if nesterov else average
    off = 4 * 2.0**-24 + (tau * error).clamp(max=2.0) if tau < INF else torch.where(n.abs() > error + TINY, 0.0, 2.0)
    assert ((its_x[~broken].double() - expected).abs() <= 0.1 * off + 2.0**-23 * (1 + wide[0].abs())).all()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tau", [INF, 5.0])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight", "grad"), [*itertools.product(WEIGHTS, WEIGHTS)])
def test_every_dtype_moves_as_float32_and_is_rounded_once(loop, tau, state, weight, grad):
    """At odd lengths and addresses that only an element's size divides; broken gradients leave every bit."""
    for length, offset in ((1, 0), (63, 1), (64, 3), (1027, 1)):
        x, g = random(length + offset, dtype=weight)[offset:], random(length + offset, seed=1, dtype=grad)[offset:]
        m = random(length + offset, seed=2, dtype=state)[offset:]
        g[5::17], g[7::17] = math.nan, -INF
        before = x.clone(), m.clone()
        wide_x, wide_m = x.to(torch.float32, copy=True), m.to(torch.float32, copy=True)
        move(x, g, m, RULE._replace(tau=tau), loop)
        move(wide_x, g.float(), wide_m, RULE._replace(tau=tau), loop)
        assert torch.equal(bits(x), bits(wide_x.to(weight))) and torch.equal(bits(m), bits(wide_m.to(state)))
        for now, then in zip((x, m), before, strict=True):
            assert torch.equal(bits(now)[~g.isfinite()], bits(then)[~g.isfinite()])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tau", [INF, 5.0])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_no_threads_and_no_shards_change_a_bit(loop, tau, state, threads):
    size, cuts = 70_001, (0, 1, 64, 1000, 33_333, 70_001)

    def run(count: int, sharded: bool) -> list[Tensor]:
        torch.set_num_threads(count)
        x, g, m = random(size), random(size, seed=1), random(size, seed=2, dtype=state)
        g[::1001] = math.nan
        pieces = [*itertools.pairwise(cuts)] if sharded else [(0, size)]
        columns = [[t[begin:end] for begin, end in pieces] for t in (x, g, m)]
        cpu.step_(columns_of(*columns), RULE._replace(tau=tau), Step(), loop=loop)
        return [x, m]

    whole = run(1, False)
    for count, sharded in ((2, False), (1, True), (2, True)):
        assert all(map(torch.equal, map(bits, whole), map(bits, run(count, sharded))))


@pytest.mark.parametrize("loop", LOOPS)
def test_noise_does_not_depend_on_threads_and_differs_between_seeds(loop, threads):
    def run(count: int, seed: int) -> Tensor:
        torch.set_num_threads(count)
        m = torch.zeros(70_001, dtype=torch.bfloat16)
        move(random(70_001), random(70_001, seed=1), m, RULE, loop, seed)
        return m

    assert torch.equal(run(1, 5), run(2, 5)) and not torch.equal(run(1, 5), run(1, 6))


def test_plain_rows_go_to_c_and_the_others_to_foreach(monkeypatch):
    """Mixed in one list: a float64 row, a weight with gaps, which is copied, and plain ones."""
    gone: list[int] = []
    its_own = softsignum.foreach_

    def foreach(columns: Columns, *rest: object) -> None:
        gone.append(len(columns))
        its_own(columns, *rest)

    monkeypatch.setattr(softsignum, "foreach_", foreach)
    apart = torch.zeros(20)[::2].copy_(random(10))
    xs = [random(5), random(7, dtype=torch.float64), apart, random(3, dtype=torch.bfloat16)]
    gs = [random(len(x), seed=1).to(x.dtype) for x in xs]
    ms = [torch.zeros(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for x in xs]
    expected = [x.clone() for x in xs], [m.clone() for m in ms]
    step_(columns_of(expected[0], gs, expected[1]), RULE, Step(), "foreach")
    gone.clear()
    versions = [x._version for x in (*xs, *ms)]
    step_(columns_of(xs, gs, ms), RULE, Step(), "auto")
    assert gone == [1]
    assert all(x._version > before for x, before in zip((*xs, *ms), versions, strict=True))
    for now, then in zip((*xs, *ms), (*expected[0], *expected[1]), strict=True):
        # Two float32 roundings of numbers of size 1, or one of bfloat16 between two ways to round them.
        torch.testing.assert_close(now, then, rtol=2**-7 if now.dtype == torch.bfloat16 else 0, atol=3e-7)


def test_tensors_that_share_memory_go_to_foreach():
    """A gradient that is m itself: a loop over memory would read what it has just written."""
    x, m = random(9), random(9, seed=1)
    its_x, its_m, g = x.clone(), m.clone(), m.clone()
    step_(columns_of([x], [m], [m]), RULE, Step(), "auto")
    step_(columns_of([its_x], [g], [its_m]), RULE, Step(), "foreach")
    assert torch.equal(x, its_x) and torch.equal(m, its_m)
