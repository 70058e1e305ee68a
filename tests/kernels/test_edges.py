"""Every kernel on the CPU where floating point ends: zeros, denormals, overflow, NaN; and what it promises."""

import pytest
import torch
from torch import Tensor

from tests.kernels.by_keyword import foreach
from tests.kernels.kernels import KERNELS
from tests.tensors import bits

INF, NAN = float("inf"), float("nan")
HYPER = {"lr": 0.1, "beta1": 0.95, "beta2": 0.95, "p": 3.0, "weight_decay": 0.1, "nesterov": True}
SHRINK = 1 - 0.1 * 0.1  # what decay alone leaves of a weight
POWERS = pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])


@pytest.fixture(params=KERNELS)
def s3_step_(request):
    return KERNELS[request.param]


def warm(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with the state that some ordinary gradients leave."""
    torch.manual_seed(0)
    x, m, r = torch.randn(shape).to(dtype), torch.zeros(shape), torch.zeros(shape)
    for _ in range(3):
        foreach.s3_step_([x], [torch.randn(shape).to(dtype)], [m], [r], **HYPER)
    return x, m, r


@POWERS
def test_rows_without_gradient_only_decay(s3_step_, p):
    """An embedding's untouched rows have r = 0: 0/0 must move nothing, and must leave no NaN behind."""
    x, m, r = torch.ones(4, 3), torch.zeros(4, 3), torch.zeros(4, 3)
    grad = torch.zeros(4, 3)
    grad[1] = 1.0
    for _ in range(3):
        s3_step_([x], [grad], [m], [r], **{**HYPER, "p": p})
    untouched = [0, 2, 3]
    torch.testing.assert_close(x[untouched], torch.full((3, 3), SHRINK**3))
    assert not m[untouched].any() and not r[untouched].any()
    assert (x[1] < SHRINK**3 - 0.01).all()


@POWERS
def test_a_row_whose_gradients_end_comes_to_rest(s3_step_, p):
    """Incident: m and r fade under zero gradients, but the last few units of float32's smallest denormal never do
    (beta * m rounds back to m). Both stood still there, and their ratio moved the weight by 0.3 lr (p = 3) at every
    step for ever: an embedding row whose token stays away for 5,000 steps. Started low here, to get there soon."""
    x, m, r = torch.ones(1), torch.zeros(1), torch.zeros(1)
    statistics = torch.zeros(5, dtype=torch.float64)
    for t in range(1000):
        statistics.zero_()
        s3_step_([x], [torch.full((1,), 0.0 if t else 1e-36)], [m], [r], **{**HYPER, "p": p}, statistics=statistics)
        if t == 0:
            torch.testing.assert_close(statistics[1].item(), (1 - 0.95**2) ** (1 - 1 / p), rtol=1e-6, atol=0)
    assert statistics[1] == 0
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_broken_coordinate_keeps_every_bit_and_its_neighbours_move(s3_step_, dtype, bad):
    x, m, r = warm(4097, dtype=dtype)
    if dtype == torch.float64:
        m, r = m.double(), r.double()
    x[5] = -0.0
    grad = torch.randn(4097).to(dtype)
    broken = torch.zeros(4097, dtype=torch.bool)
    broken[[0, 5, 17, 4096]] = True
    others = [t.clone() for t in (x, m, r)]
    s3_step_([others[0]], [grad], [others[1]], [others[2]], **HYPER)
    before = [t.clone() for t in (x, m, r)]
    s3_step_([x], [torch.where(broken, bad, grad)], [m], [r], **HYPER)
    for old, now, whole in zip(before, (x, m, r), others, strict=True):
        assert torch.equal(bits(now[broken]), bits(old[broken]))
        assert torch.equal(bits(now[~broken]), bits(whole[~broken]))
        assert not torch.equal(now[~broken], old[~broken])


def test_a_tensor_of_nan_changes_no_bit_and_the_next_tensor_moves(s3_step_):
    x, m, r = warm(31)
    other = torch.ones(3)
    statistics = torch.zeros(5, dtype=torch.float64)
    before = [bits(t) for t in (x, m, r)]
    state = torch.zeros(3), torch.zeros(3)
    grads = [torch.full((31,), NAN), torch.ones(3)]
    s3_step_([x, other], grads, [m, state[0]], [r, state[1]], **HYPER, statistics=statistics)
    assert all(torch.equal(bits(t), old) for t, old in zip((x, m, r), before, strict=True))
    assert (other < 0.99).all()
    # Theorem: the first step is (1 - beta^2)^(1 - 1/p); the 31 broken coordinates count as not moved.
    first = 0.211837614465
    expected = torch.tensor([3 * first, first, 0.0, 3.0, 34.0], dtype=torch.float64)
    torch.testing.assert_close(statistics, expected, rtol=1e-6, atol=0)


@POWERS
@pytest.mark.parametrize("size", [1e-45, 7e-45, 1e-42, 1e-38])
def test_denormal_gradients_never_move_a_weight_too_far(s3_step_, p, size):
    """m and r have no digits left here, so no ratio is promised: only its bound, its sign, and finite numbers."""
    x, m, r = torch.ones(2), torch.zeros(2), torch.zeros(2)
    for _ in range(20):
        before = x.clone()
        s3_step_([x], [torch.tensor([size, -size])], [m], [r], **{**HYPER, "p": p})
        update = (before * SHRINK - x) / 0.1
        assert x.isfinite().all() and (update.abs() <= 1 + 1e-5).all()
        assert update[0] >= -1e-5 and update[1] <= 1e-5


@POWERS
def test_finite_gradients_of_any_size_leave_finite_weights(s3_step_, p):
    """Incident: 20 gradients of 3e38 and one of -3e38, all finite, made g - m overflow and m infinite, and every
    weight NaN one step later. A gradient beyond a quarter of float32's range is left out like an infinite one."""
    x, m, r = torch.ones(3), torch.zeros(3), torch.zeros(3)
    for t in range(45):
        sign = -1.0 if t >= 40 else 1.0
        grad = torch.tensor([sign * 3e38, sign * 8e37, sign])
        s3_step_([x], [grad], [m], [r], **{**HYPER, "p": p})
        assert all(t.isfinite().all() for t in (x, m, r))
    assert x[0] == 1 and m[0] == 0 and r[0] == 0
    assert (x[1:] < 0.9).all()
    torch.testing.assert_close(x[1], x[2], rtol=1e-5, atol=0)


def test_float32_cannot_exceed_one(s3_step_):
    """A constant gradient drives n/b to its limit 1; unclamped, rounding reached 1 + 1.1e-6 in 1,000 steps."""
    torch.manual_seed(0)
    grad = torch.rand(4097) + 0.5
    x, m, r = torch.ones(4097), torch.zeros(4097), torch.zeros(4097)
    largest = torch.zeros(5, dtype=torch.float64)
    for _ in range(300):
        statistics = torch.zeros(5, dtype=torch.float64)
        s3_step_([x], [grad], [m], [r], **HYPER, statistics=statistics)
        largest = torch.maximum(largest, statistics)
    assert largest[1] == 1


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_modified(s3_step_, maximize):
    for dtype in (torch.float32, torch.bfloat16):
        x, m, r = warm(7, dtype=dtype)
        grad = torch.tensor([1.0, -2.0, NAN, INF, 0.0, -0.0, 3e38]).to(dtype)
        before = bits(grad)
        s3_step_([x], [grad], [m], [r], **HYPER, maximize=maximize)
        assert torch.equal(bits(grad), before)


def agreeing(x: Tensor, grad: Tensor) -> Tensor:
    """How many coordinates of a weight that started at 0 went against the gradient's sign, as they should."""
    return (x.sign() == -grad.sign()).sum()


def test_statistics_add_up_over_calls_and_count_what_was_applied(s3_step_):
    x, m, r = torch.zeros(7), torch.zeros(7), torch.zeros(7)
    empty = torch.zeros(0)
    statistics = torch.zeros(5, dtype=torch.float64)
    s3_step_([empty], [empty], [empty.clone()], [empty.clone()], **HYPER, statistics=statistics)
    assert not statistics.any()
    expected = torch.zeros(5, dtype=torch.float64)
    for grad in torch.randn(3, 7):
        x.zero_()  # so that the new weight is the update
        s3_step_([x], [grad], [m], [r], **{**HYPER, "lr": 1.0}, statistics=statistics)
        update = x.abs().double()
        largest = torch.maximum(expected[1], update.max())
        expected += torch.stack(
            [update.sum(), largest - expected[1], (update > 0.9).sum(), agreeing(x, grad), torch.tensor(7.0)]
        )
    torch.testing.assert_close(statistics, expected, rtol=1e-14, atol=0)


def test_a_tensor_learning_rate_is_the_number_bit_for_bit(s3_step_):
    as_number, as_tensor = warm(31), warm(31)
    grad = torch.randn(31)
    for (x, m, r), lr in ((as_number, 0.25), (as_tensor, torch.tensor(0.25, dtype=torch.float64))):
        s3_step_([x], [grad], [m], [r], **{**HYPER, "lr": lr})
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(as_number, as_tensor, strict=True))


def test_foreach_reads_nothing_back_from_the_device():
    """Meta tensors have no data, so any .item(), bool() or comparison on the host would raise here."""
    x, grad = torch.empty(2, 5, device="meta", dtype=torch.bfloat16)
    m, r = torch.empty(2, 5, device="meta")
    statistics = torch.zeros(5, dtype=torch.float64, device="meta")
    lr = torch.tensor(0.1, device="meta")
    for maximize in (False, True):
        foreach.s3_step_([x], [grad], [m], [r], **{**HYPER, "lr": lr}, maximize=maximize, statistics=statistics)
    with pytest.raises(RuntimeError):
        statistics[1].item()
