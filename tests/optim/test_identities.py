"""What the papers prove about the update, held against the reference and the optimizer (docs/algorithm.md)."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from s3_megatron.optim import S3
from s3_megatron.optim.reference import reference_updates, s3_reference_step, update_bound

BETAS = pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.99])
POWERS = pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])


def noise(steps: int, coordinates: int = 1000) -> Tensor:
    """Gradients of many sizes and both signs, float64, never 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(2, steps, coordinates, dtype=torch.float64, generator=generator)
    return sizes[0] * (3 * sizes[1]).exp()


@BETAS
@POWERS
def test_the_update_is_bounded_and_only_a_constant_gradient_reaches_the_bound(applied_updates, beta, p):
    """|n/b| <= (1 - beta^(t+1))^(1 - 1/p) <= 1, with equality for a constant gradient."""
    bounds = torch.tensor([update_bound(t, beta=beta, p=p) for t in range(1, 31)], dtype=torch.float64)
    noisy, _ = applied_updates(noise(30), beta=beta, p=p)
    assert (noisy.abs().amax(dim=1) <= bounds + 1e-12).all()
    constant, _ = applied_updates(torch.full((30, 1), -7.0, dtype=torch.float64), beta=beta, p=p)
    torch.testing.assert_close(-constant[:, 0], bounds, rtol=0, atol=1e-12)
    assert bounds.max() < 1 or p == 1


def test_the_first_step_by_default(applied_updates):
    """(1 - .95^2)^(2/3) = 0.21184 whatever the gradient: the paper's defaults are S3's."""
    updates, _ = applied_updates(noise(1))
    torch.testing.assert_close(updates[0].abs(), torch.full((1000,), 0.21184).double(), rtol=0, atol=5e-6)


@POWERS
@pytest.mark.parametrize("nesterov", [True, False])
def test_beta_zero_gives_the_sign(applied_updates, p, nesterov):
    gradients = noise(5)
    updates, _ = applied_updates(gradients, beta=0.0, p=p, nesterov=nesterov)
    torch.testing.assert_close(updates, gradients.sign(), rtol=0, atol=1e-12)


@POWERS
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 3.0, 1e20])
def test_scaling_every_gradient_changes_nothing(applied_updates, p, scale):
    """An eps would break this at the small scales first."""
    updates, _ = applied_updates(noise(10), p=p)
    scaled, _ = applied_updates(noise(10) * scale, p=p)
    torch.testing.assert_close(scaled, updates, rtol=0, atol=1e-12)


def test_the_denominator_grows_with_p(applied_updates):
    """b is a power mean times (1 - beta^(t+1))^(1/p): both grow with p, so |n/b| falls, at every step."""
    sizes = [applied_updates(noise(10), p=p)[0].abs() for p in (1, 1.5, 2, 3, 8)]
    for smaller_p, larger_p in pairwise(sizes):
        assert (larger_p < smaller_p).all()


def test_three_forms_of_nesterovs_step_agree():
    """Theorem 3, for a constant rate without decay. The three forms taken here (the paper names the theorem):

    1. Algorithm 1: n_t = beta m_t + (1-beta) g_t.
    2. One recursion, no m: n_t = beta n_{t-1} + (1-beta) (g_t + beta (g_t - g_{t-1})), because
       n_t - beta n_{t-1} = beta (1-beta) g_t + (1-beta) (g_t - beta g_{t-1}). The same for b^p and |g|^p.
    3. Nesterov's own: theta moves by m alone, and the gradient is taken at the look-ahead point
       x_t = theta_t - lr beta m_t / b_t. With both steps in the metric b_t of the day, leaving the old look-ahead
       and taking the new one adds up to (m_t + beta m_t - beta m_{t-1}) / b_t = n_t / b_t.

    The gradient is that of a real function at each form's own point, so that one wrong step would be felt later.
    """
    beta, p, lr = 0.95, 3.0, 0.05

    def gradient(x: Tensor) -> Tensor:
        return torch.sinh(x) + 0.3 * torch.cos(5 * x)

    x1 = x2 = x3 = torch.linspace(-2, 2, 101, dtype=torch.float64)
    zero = torch.zeros_like(x1)
    m1 = s1 = n2 = b2 = g2 = a2 = m3 = s3 = zero
    for _ in range(50):
        x1, m1, s1, _ = s3_reference_step(x1, gradient(x1), m1, s1, lr=lr, beta1=beta, beta2=beta, p=p)

        g, a = gradient(x2), gradient(x2).abs() ** p
        n2 = beta * n2 + (1 - beta) * (g + beta * (g - g2))
        b2 = beta * b2 + (1 - beta) * (a + beta * (a - a2))
        x2, g2, a2 = x2 - lr * n2 / b2 ** (1 / p), g, a

        g = gradient(x3)
        s3 = beta * s3 + (1 - beta) * g.abs() ** p
        metric = lr / (beta * s3 + (1 - beta) * g.abs() ** p) ** (1 / p)
        theta = x3 + metric * beta * m3
        m3 = beta * m3 + (1 - beta) * g
        theta = theta - metric * m3
        x3 = theta - metric * beta * m3
    torch.testing.assert_close(x2, x1, rtol=0, atol=1e-12)
    torch.testing.assert_close(x3, x1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_without_nesterov_and_with_p_2_it_is_adam_times_the_bias_correction(beta):
    """Adam(beta1 = beta2, eps = 0) divides m by 1-beta^t and sqrt(v) by its root: sqrt(1-beta^t) sets that right.

    Here the rate of torch's AdamW carries the factor, and its decay the inverse.
    """
    ours = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    adams = ours.detach().clone().requires_grad_()
    s3 = S3([ours], lr=0.1, beta=beta, p=2, weight_decay=0.1, nesterov=False)
    adam = torch.optim.AdamW([adams], betas=(beta, beta), eps=0)
    for t, grad in enumerate(noise(20), start=1):
        factor = math.sqrt(1 - beta**t)
        adam.param_groups[0].update(lr=0.1 * factor, weight_decay=0.1 / factor)
        ours.grad, adams.grad = grad, grad.clone()
        s3.step()
        adam.step()
        torch.testing.assert_close(ours, adams, rtol=0, atol=1e-12)


def worst_stream(beta1: float, beta2: float, p: float, *, nesterov: bool = True) -> tuple[Tensor, float]:
    """The 300 gradients that make the last |n/b| largest, float64, and that |n/b| (older ones no longer count).

    With n = sum a_i g_i and b^p = sum c_i |g_i|^p over the age i, Hoelder's inequality bounds |n/b| by the q-norm of
    a_i / c_i^(1/p), 1/p + 1/q = 1. It is an equality where g_i^(p-1) is proportional to a_i / c_i; for p = 1, where
    only the age with the largest a_i / c_i has any gradient.
    """
    age = torch.arange(300, dtype=torch.float64)
    a, c = ((1 - beta) * beta ** (age + nesterov) for beta in (beta1, beta2))
    if nesterov:
        a[0], c[0] = 1 - beta1**2, 1 - beta2**2
    q = p / (p - 1) if p > 1 else math.inf
    bound = torch.linalg.vector_norm(a / c ** (1 / p), ord=q).item()
    gradients = (a / c) ** (1 / (p - 1)) if p > 1 else (age == (a / c).argmax()).double()
    return gradients.flip(0), bound


THEOREM_2 = {  # betas, p: the largest |n/b|, as printed
    ((0.9, 0.999), 1): 95.0,
    ((0.9, 0.999), 2): 7.267,
    ((0.9, 0.999), 3): 3.610,
    ((0.9, 0.95), 1): 1.949,
    ((0.9, 0.95), 2): 1.165,
    ((0.9, 0.95), 3): 1.092,
}


@pytest.mark.parametrize(("betas", "p"), THEOREM_2)
def test_betas_apart_reach_theorem_2s_larger_bound_and_no_more(applied_updates, betas, p):
    gradients, bound = worst_stream(*betas, p)
    assert bound == pytest.approx(THEOREM_2[betas, p], rel=5.1e-4)  # half of the last printed digit
    worst, _ = applied_updates(gradients[:, None], betas=betas, p=p)
    assert worst[-1].item() == pytest.approx(bound, rel=1e-12)
    *_, by_reference = reference_updates(gradients, beta1=betas[0], beta2=betas[1], p=p)
    assert by_reference.item() == pytest.approx(bound, rel=1e-12)
    near, _ = applied_updates(gradients[:, None] * (1 + 0.01 * noise(300)), betas=betas, p=p)
    assert 1 < near.abs().max() <= bound * (1 + 1e-12)


def test_adams_own_update_may_reach_seven():
    """Theorem 1: |m|/sqrt(v) of Adam at (.9, .999) may be 7.27; the telemetry must be able to show such a step."""
    param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.AdamW([param], betas=(0.9, 0.999), weight_decay=0.1)
    gradients, bound = worst_stream(0.9, 0.999, 2, nesterov=False)
    for grad in gradients:
        param.grad = grad[None]
        adam.step()
    state = adam.state[param]
    reached = (state["exp_avg"] / state["exp_avg_sq"].sqrt()).item()
    assert reached == pytest.approx(bound, rel=1e-12)
    assert reached == pytest.approx(7.27, abs=0.005)
