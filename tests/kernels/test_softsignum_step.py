"""SoftSignum's kernels: golden vectors, the reference, limits and bounds, denormals, dtypes, noise.

Every test runs by foreach and by each of this machine's C++ loops.
"""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from s3_megatron.kernels import cpu
from s3_megatron.kernels.cpu import library
from s3_megatron.optim.softsignum_reference import softsignum_reference_step
from tests.kernels.by_keyword import softsignum_step_
from tests.tensors import bits, random

INF = math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (beta, tau): updates for the gradients 1, -2, .5, 0, 3, 3 from m = 0.
GRADIENTS = (1.0, -2.0, 0.5, 0.0, 3.0, 3.0)
GOLDEN = {
    (0.9, 5.0): "0.462117157260 -0.500520211190 -0.240212864686 -0.216994569832 0.862121648199 0.990480509290",
    (0.95, 2.0): "0.099667994625 -0.104615819149 -0.049708995808 -0.047227340641 0.249707301963 0.494761440032",
    (0.9, INF): "1 -1 -1 -1 1 1",
}
# beta .95, lr .1, decay .1, x from 1: gradient, tau; m, update, x.
WALK = [
    (0.02, INF, 0.001, 1, 0.89),
    (-0.05, INF, -0.00155, -1, 0.9811),
    (0.03, 50.0, 0.0000275, 0.001374999133464, 0.971151500086654),
    (0.01, 20.0, 0.000526125, 0.010522111656255, 0.960387773920162),
    (-0.04, 5.0, -0.00150018125, -0.007500765577183, 0.951533972738678),
]


@pytest.fixture(autouse=True, params=["foreach", *library.loops()])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves the tensors that C++ takes."""
    if request.param == "foreach":
        monkeypatch.setitem(WAY, "implementation", "foreach")
    else:
        monkeypatch.setattr(cpu, "step_", functools.partial(cpu.step_, loop=library.loops().index(request.param)))


WAY = {"implementation": "auto"}


def kernel(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], **settings: Any) -> None:
    settings = {"lr": 0.1, "beta": 0.9, "tau": 5.0, "weight_decay": 0.1, "nesterov": False, **settings}
    softsignum_step_(params, grads, ms, **settings, **WAY)


@pytest.mark.parametrize(("setting", "row"), GOLDEN.items())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_vectors(setting: tuple[float, float], row: str, dtype: torch.dtype) -> None:
    """The reference to 1e-12, as they are printed; float32 to 1e-6, a few roundings of an update of at most 1, which
    is recovered from a weight that decays."""
    beta, tau = setting
    expected = [float(x) for x in row.split()]
    wide, m = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x, state = torch.full((1,), 0.5, dtype=dtype), torch.zeros(1, dtype=dtype)
    for g, u in zip(GRADIENTS, expected, strict=True):
        wide, m, update = softsignum_reference_step(
            wide, torch.tensor(g, dtype=torch.float64), m, lr=1.0, beta=beta, tau=tau, weight_decay=0.1
        )
        assert update.item() == pytest.approx(u, abs=1e-12)
        before = x.double().clone()
        kernel([x], [torch.tensor([g], dtype=dtype)], [state], lr=0.5, beta=beta, tau=tau)
        moved = (before * (1 - 0.5 * 0.1) - x.double()) / 0.5
        assert moved.item() == pytest.approx(u, abs=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_walk(dtype: torch.dtype) -> None:
    """To 2e-15 they are printed; float32 to 2e-7, two roundings of a weight of 1. The update is recovered from the
    weight: the division by lr makes its roundings ten times larger."""
    x, m = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    for g, tau, its_m, its_update, its_x in WALK:
        before = x[0].item()
        kernel([x], [torch.full((3,), g, dtype=dtype)], [m], beta=0.95, tau=tau)
        tolerance = 2e-15 if dtype == torch.float64 else 2e-7
        assert m[0].item() == pytest.approx(its_m, abs=tolerance)
        assert x[0].item() == pytest.approx(its_x, abs=tolerance)
        assert (before * (1 - 0.1 * 0.1) - x[0].item()) / 0.1 == pytest.approx(its_update, abs=10 * tolerance)


SETTINGS = [
    {},
    {"nesterov": True},
    {"tau": INF, "nesterov": True},
    {"tau": INF},
    {"beta": 0.0},
    {"beta": 0.3, "nesterov": True},
    {"beta": 0.999, "weight_decay": 0.0},
    {"tau": 1e9},
    {"maximize": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_kernel_follows_the_reference(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Five steps from float32 gradients. An update's slope is up to tau, so gradients are 1 here; a sign is exact where
    m is not all but 0, of which 97 random numbers have none."""
    x, m = random(97, dtype=dtype), torch.zeros(97, dtype=dtype)
    wide, its_m = x.double().clone(), m.double().clone()
    for step in range(5):
        g = random(97, seed=step + 1)
        kernel([x], [g.to(dtype)], [m], **settings)
        own = {"beta": 0.9, "tau": 5.0, "weight_decay": 0.1, **settings}
        sign = -1 if own.pop("maximize", False) else 1
        wide, its_m, _ = softsignum_reference_step(wide, sign * g.double(), its_m, lr=0.1, **own)
    # Five steps' roundings of m (6e-8), times tau = 5 and lr = .1, beside those of x.
    torch.testing.assert_close(x.double(), wide, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(m.double(), its_m, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


def test_an_infinite_tau_is_the_sign_and_a_high_one_nearly() -> None:
    """At tau 1e9 tanh is 1 to float32's last bit for every |m| above 1e-8."""
    hard, soft = (random(1001).clone() for _ in range(2))
    m = random(1001, seed=1)
    m = torch.where(m.abs() < 1e-8, 1.0, m)
    old, g = hard.clone(), torch.zeros(1001)
    for x, tau in ((hard, INF), (soft, 1e9)):
        kernel([x], [g], [m.clone()], tau=tau)
    torch.testing.assert_close(hard, old - 0.1 * (m.sign() + 0.1 * old), rtol=0, atol=1e-6)
    assert torch.equal(hard, soft)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tau_beyond_float32_is_the_hard_step(dtype: torch.dtype) -> None:
    """As tmax 1e39 makes the first soft one. In float32 it was infinity, times an m of 0: the weight became NaN."""
    m = random(101, seed=1, dtype=dtype)
    m[::3] = 0.0
    hard, soft = (random(101, dtype=dtype) for _ in range(2))
    for x, tau in ((hard, INF), (soft, 1e39)):
        kernel([x], [torch.zeros(101, dtype=dtype)], [m.clone()], tau=tau)
    assert torch.equal(hard, soft) and hard.isfinite().all()


def test_a_low_tau_is_momentum_sgd_at_lr_tau() -> None:
    """tanh(y) = y (1 - y^2/3): at tau .001 and |m| < 3 it is y to 3e-6 of it."""
    x, m, g = random(1001), torch.zeros(1001), random(1001, seed=1).clamp(-3, 3)
    old = x.clone()
    kernel([x], [g], [m], tau=1e-3, lr=10.0, weight_decay=0.01)
    expected = old - 10.0 * (1e-3 * 0.1 * g + 0.01 * old)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [INF, 1e9, 1e4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_update_is_longer_than_the_rate(tau: float, dtype: torch.dtype) -> None:
    """From a weight of 0, which hides no bit: |x| <= lr exactly, for gradients of every size."""
    sizes = torch.logspace(-37, 37, 4001, dtype=torch.float64) * torch.tensor([1, -1]).repeat(2001)[:4001]
    x, m = torch.zeros(4001, dtype=dtype), torch.zeros(4001, dtype=dtype)
    for nesterov in (False, True):
        x.zero_()
        kernel([x], [sizes.to(dtype)], [m], tau=tau, lr=0.125, nesterov=nesterov)
        assert x.abs().max() == 0.125 and x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_left_of_a_gradient_long_gone_moves_nothing(dtype: torch.dtype) -> None:
    """After thousands of zero gradients m rests at a denormal, which rounding to nearest never makes smaller. Its sign
    moved the weight by lr in every step, for ever."""
    x, m = torch.ones(5, dtype=dtype), torch.full((5,), torch.finfo(dtype).tiny * 0.9, dtype=dtype)
    for tau in (INF, 1e9):
        kernel([x], [torch.zeros(5, dtype=dtype)], [m], tau=tau, weight_decay=0.0)
    assert torch.equal(x, torch.ones(5, dtype=dtype)) and m.all()
    smallest = torch.full((5,), torch.finfo(dtype).tiny * 1.2, dtype=dtype)
    kernel([x], [torch.zeros(5, dtype=dtype)], [smallest], tau=INF, weight_decay=0.0)
    torch.testing.assert_close(x, torch.full((5,), 0.9, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_weights_have_a_float32_state_and_are_rounded_once(dtype: torch.dtype) -> None:
    low, g = random(4097, dtype=dtype), random(4097, seed=1, dtype=dtype)
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    wide, ms = low.to(wide_dtype), [torch.zeros(4097, dtype=wide_dtype) for _ in range(2)]
    kernel([low], [g], ms[:1])
    kernel([wide], [g], ms[1:])
    assert torch.equal(bits(low), bits(wide.to(dtype))) and torch.equal(*ms)


def test_a_bfloat16_state_is_rounded_to_nearest_or_without_bias() -> None:
    """The mean over 4,096 coordinates of one value between two of bfloat16, 2^-7 apart: stochastic rounding gives it
    to 5 standard deviations, 2^-8 / 64 each; to nearest gives the lower one."""
    value = 1.0 + 2**-7 * 0.3
    x, g = torch.zeros(4096), torch.full((4096,), value)
    ms = [torch.zeros(4096, dtype=torch.bfloat16) for _ in range(3)]
    for m, seed in zip(ms, (None, 5, 6), strict=True):
        kernel([x.clone()], [g], [m], beta=0.0, rounding_seed=None if seed is None else torch.tensor(seed))
    assert torch.equal(ms[0], torch.ones(4096, dtype=torch.bfloat16))
    for m in ms[1:]:
        assert m.double().mean().item() == pytest.approx(value, abs=5 * 2**-8 / 64)
    assert not torch.equal(ms[1], ms[2])


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are cut by size and by the states' dtype move as one tensor at a time, noise included.

    50 and 30 elements are of one dtype: with batches of 8, in which 5 and 3 came together, nothing was cut.
    """

    def run() -> list[Tensor]:
        xs = [
            random(n, seed=n, dtype=d)
            for n, d in ((50, torch.float32), (9, torch.float64), (70, torch.bfloat16), (30, torch.float32))
        ]
        dtypes = (torch.bfloat16, torch.float64, torch.bfloat16, torch.bfloat16)
        ms = [torch.zeros(x.shape, dtype=d) for x, d in zip(xs, dtypes, strict=True)]
        kernel(xs, [random(len(x), seed=1, dtype=x.dtype) for x in xs], ms, rounding_seed=torch.tensor(3))
        return [*xs, *ms]

    whole = run()
    monkeypatch.setattr("s3_megatron.kernels.softsignum._AT_ONCE", 60)
    assert all(map(torch.equal, whole, run()))
