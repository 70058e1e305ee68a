"""Every kernel on the CPU against Algorithm 1 in float64, over shapes, dtypes, hyperparameters and gradient scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3_megatron.optim.reference import s3_reference_step
from tests.kernels.kernels import KERNELS

SHAPES = [(), (0,), (3, 0), (1,), (31, 1), (7, 13), (2, 3, 5), (4097,)]

# Error of m/r, of r and of n/b, in units of the state's rounding, 2^-24 or 2^-53. Every step adds one rounding of m
# and about six of r (quotient, powers, mean, root, product); they fade with beta, and nothing amplifies them: the
# root divides relative errors by p, and |m| <= r. Measured over 1,500 runs: 3.2 a step; the rest is for other vector
# maths libraries. In float64 the oracle's own error is the larger one (41 measured): 1/p is rounded, and a relative
# error e of an exponent changes s^(1/p) by e * ln|g|, where |ln|g|| < 80.
ULPS_PER_STEP = {torch.float32: 6, torch.float64: 100}


@pytest.fixture(params=KERNELS)
def s3_step_(request):
    return KERNELS[request.param]


@st.composite
def problems(draw):
    """Parameters of one or several dtypes and a few steps of gradients, each step with a scale of its own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    low = [torch.float32, torch.bfloat16, torch.float16]
    dtypes = draw(st.one_of(st.just([torch.float64]), st.lists(st.sampled_from(low), min_size=1, max_size=3)))
    params = [
        torch.randn(draw(st.sampled_from(SHAPES)), dtype=torch.float64, generator=generator).to(dtype)
        for dtype in dtypes
    ]
    # Where a dtype cannot hold the scale its gradients become 0 or inf, and the oracle sees these as they are.
    exponents = draw(st.lists(st.floats(-30, 20), min_size=1, max_size=6))
    steps = [[_gradient(x, 10.0**e, generator, broken=draw(st.booleans())) for x in params] for e in exponents]
    return params, steps


def _gradient(like: Tensor, scale: float, generator: torch.Generator, *, broken: bool) -> Tensor:
    """A gradient with zero coordinates, and if broken with non-finite ones."""
    grad = torch.randn(like.shape, dtype=torch.float64, generator=generator)
    kind = torch.rand(like.shape, generator=generator)
    grad[kind < 0.2] = 0.0
    if broken:
        grad[kind > 0.8] = torch.nan
        grad[kind > 0.9] = -torch.inf
    return (scale * grad).to(like.dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=150, derandomize=True)
@given(
    problem=problems(),
    # Below 1e-3 a beta is 0 in all but name.
    beta=st.sampled_from([0.0, 0.9, 0.95, 0.999]) | st.floats(1e-3, 0.999),
    p=st.sampled_from([1, 1.5, 2, 3, 8]),
    lr=st.floats(1e-4, 1.0),
    weight_decay=st.floats(1e-3, 1.0),
    nesterov=st.booleans(),
)
def test_every_step_is_the_oracles(kernel, problem, beta, p, lr, weight_decay, nesterov):
    """m and s of the oracle run on from the start; its weight starts at each step from the kernel's own, since a
    weight of 8 bits cannot follow one of 53 for two steps."""
    params, steps = problem
    dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    if dtype == torch.float64 and kernel != "foreach":
        return  # float32's loops; op.py sends float64 to foreach
    exp_avgs = [torch.zeros_like(x, dtype=dtype) for x in params]
    roots = [torch.zeros_like(x, dtype=dtype) for x in params]
    oracle_m = [torch.zeros_like(x, dtype=torch.float64) for x in params]
    oracle_s = [torch.zeros_like(x, dtype=torch.float64) for x in params]
    for count, grads in enumerate(steps, start=1):
        before = [x.double().clone() for x in params]
        rate = {"lr": lr, "p": p, "weight_decay": weight_decay, "nesterov": nesterov}
        KERNELS[kernel](params, grads, exp_avgs, roots, beta1=beta, beta2=beta, **rate)
        unit = ULPS_PER_STEP[dtype] * count * torch.finfo(dtype).eps / 2
        for i, grad in enumerate(grads):
            ok = grad.isfinite()
            g = torch.where(ok, grad.double(), 0.0)
            x, m, s, update = s3_reference_step(before[i], g, oracle_m[i], oracle_s[i], beta1=beta, beta2=beta, **rate)
            x = torch.where(ok, x, before[i])
            oracle_m[i] = torch.where(ok, m, oracle_m[i])
            oracle_s[i] = torch.where(ok, s, oracle_s[i])
            root = oracle_s[i] ** (1 / p)
            # m is a sum of terms of both signs: its error is to be measured by their size, which r bounds.
            _assert_within(exp_avgs[i], oracle_m[i], unit * root)
            _assert_within(roots[i], root, unit * root)
            # Where r itself has faded towards the denormals, m has no digits left: test_foreach_edges holds that.
            faded = (root > 0) & (root < torch.finfo(dtype).tiny * 1e4)
            x = torch.where(faded, params[i].double(), x)
            moving = lr * unit * (1 + update.abs()) + 2 * before[i].abs() * torch.finfo(dtype).eps
            # The weight itself is rounded once: by half a ULP of its own dtype, or of the smallest number it has.
            weight = torch.finfo(params[i].dtype)
            rounding = x.abs() * weight.eps / 2 * (1 + 1e-6) + weight.smallest_normal * weight.eps / 2
            _assert_within(params[i], x, moving + rounding)


def _assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= tolerance + torch.finfo(actual.dtype).smallest_normal * 1e-6).all(), (
        f"worst error {(error / tolerance).nan_to_num().max():.2f} of its tolerance"
    )


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
@pytest.mark.parametrize("exponent", [-60, -13, 1, 40])
def test_scaling_all_gradients_by_a_power_of_two_changes_no_bit_of_a_weight(s3_step_, p, exponent):
    """Multiplying by 2^k is exact, so the same roundings happen at every scale: the float32 runs are one run.

    An eps in the denominator, a power of g that leaves the range, or a floor on b would make them differ.
    """
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(5, 4097, generator=generator)

    def run(scale: float) -> Tensor:
        x, m, r = torch.ones(4097), torch.zeros(4097), torch.zeros(4097)
        for grad in steps * scale:
            s3_step_([x], [grad], [m], [r], lr=0.1, beta1=0.95, beta2=0.95, p=p, weight_decay=0.1, nesterov=True)
        return x

    assert torch.equal(run(2.0**exponent), run(1.0))


@pytest.mark.parametrize("betas", [(0.3, 0.01), (0.01, 0.3), (0.9, 0.999), (0.999, 0.9)])
def test_betas_apart_are_not_clamped(s3_step_, betas):
    """The hypothesis test has one beta; here m and s fade at their own speeds, and |n/b| may exceed 1.

    Tolerance: four roundings of float32 a step, times |n/b|.
    """
    generator = torch.Generator().manual_seed(0)
    m = r = torch.zeros(4097)
    oracle_m = oracle_s = torch.zeros(4097, dtype=torch.float64)
    largest = 0.0
    for count in range(1, 7):
        grad = torch.randn(4097, generator=generator).double()
        # A weight of 0 makes its new value the update itself.
        x = torch.zeros(4097)
        m, r = m.clone(), r.clone()
        rate = {
            "lr": 1.0,
            "beta1": betas[0],
            "beta2": betas[1],
            "p": 3.0,
            "weight_decay": 0.1,
            "nesterov": True,
        }
        s3_step_([x], [grad.float()], [m], [r], **rate)
        _, oracle_m, oracle_s, update = s3_reference_step(
            x.double() * 0, grad.float().double(), oracle_m, oracle_s, **rate
        )
        _assert_within(-x, update, 4 * count * 2**-24 * (1 + update.abs()))
        largest = max(largest, update.abs().max().item())
    assert largest > 1 or betas[0] >= betas[1]


@pytest.mark.parametrize("p", [1, 3, 8])
def test_a_gradient_after_a_far_larger_one_under_beta_zero(s3_step_, p):
    """Incident: beta = 0 must give sign(g), but after a gradient of 1 one of 1e-16 (1e-6 at p = 8) moved nothing.

    M was the old root, the new gradient's power relative to it underflowed, and b became 0.
    """
    x, m, r = torch.ones(2), torch.zeros(2), torch.zeros(2)
    for size in (1.0, 1e-6, 1e-30):
        before = x.clone()
        grad = torch.tensor([size, -size])
        s3_step_([x], [grad], [m], [r], lr=0.5, beta1=0.0, beta2=0.0, p=p, weight_decay=0.1, nesterov=True)
        torch.testing.assert_close((0.95 * before - x) / 0.5, grad.sign(), rtol=0, atol=1e-6)
        assert torch.equal(m, grad) and torch.equal(r, grad.abs())


@pytest.mark.parametrize("beta", [1e-5, 1e-3, 0.05, 0.3])
def test_a_small_beta_is_used_to_full_precision(s3_step_, beta):
    """Incident: lerp rounds the weight 1 - beta to float32 and takes 1 - weight for the other: a beta of 1e-5 acted
    as 1.0014e-5, and n/b was wrong by 2e-4 where 1e-6 is promised."""
    x, m, r = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    oracle_m = oracle_s = torch.zeros(1, dtype=torch.float64)
    for size in (1.0, 1e-4, 1e-8):
        grad = torch.tensor([size])
        rate = {"lr": 1.0, "beta1": beta, "beta2": beta, "p": 3.0, "weight_decay": 0.1, "nesterov": True}
        x.zero_()
        s3_step_([x], [grad], [m], [r], **rate)
        _, oracle_m, oracle_s, update = s3_reference_step(x.double() * 0, grad.double(), oracle_m, oracle_s, **rate)
        torch.testing.assert_close(-x.double(), update, rtol=1e-6, atol=0)
