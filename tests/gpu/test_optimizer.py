"""The optimizer itself on a GPU: what a trainer does to it. Without a GPU the same on the CPU, by the C++ kernel."""

import copy
import io
import logging
from typing import Any

import pytest
import torch

from s3_megatron.kernels import op
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3
from tests.gpu.card import DEVICE, REAL, capture, never_waiting, on_a_late_stream

pytestmark = pytest.mark.gpu

BRAIN = torch.bfloat16
SIZES = (1, 15, 1025, 4099)


def made(device: str = DEVICE, **options: Any) -> S3:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(device)) for size in SIZES]
    return S3(params, **{"lr": 0.1, "weight_decay": 0.1, **options})


def params(optimizer: S3) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def fill(optimizer: S3, seed: int) -> None:
    """Put gradients there, in place where there are some: a captured step reads them where they are."""
    generator = torch.Generator().manual_seed(seed)
    for param in params(optimizer):
        grad = torch.randn(param.shape, generator=generator).to(param.device)
        param.grad = grad if param.grad is None else param.grad.copy_(grad)


def train(optimizer: S3, *seeds: int) -> S3:
    for seed in seeds:
        fill(optimizer, seed)
        optimizer.step()
    return optimizer


def bits(optimizer: S3) -> list[torch.Tensor]:
    states = [optimizer.state[param][name] for param in params(optimizer) for name in (EXP_AVG, EXP_AVG_ROOT)]
    return [x.detach().cpu().clone() for x in (*params(optimizer), *states)]


def same(one: S3, other: S3) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


@pytest.mark.parametrize("options", [{}, {"p": 1.5}, {"state_dtype": BRAIN}], ids=str)
def test_ten_steps_are_those_of_foreach(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A dozen roundings of 2^-24 a step, faded away in twenty: 1e-5 in float32. A state rounded to bfloat16 the other
    way is 2^-8 off, and moves its weight by as much of the rate 0.1, at most in each of ten steps."""
    op._announce.cache_clear()
    op.choose.cache_clear()
    with caplog.at_level(logging.INFO):
        ours = train(made(**options), *range(10))
    theirs = train(made(implementation="foreach", **options), *range(10))
    wanted = "triton" if REAL else "cpu"
    assert f"S3 steps on {DEVICE} by kernel {wanted}" in caplog.text
    room = 10 * 0.1 * 2**-8 if "state_dtype" in options else 1e-5
    for a, b in zip(params(ours), params(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=room)


def test_a_step_never_waits_for_the_gpu() -> None:
    """torch itself watches, on a GPU. What every step copied from the host was the seed."""
    optimizer = train(made(state_dtype=BRAIN, rounding_seed=3), 0)
    optimizer.update_statistics = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    fill(optimizer, 1)
    with never_waiting():
        optimizer.step()
        optimizer.step()
    assert optimizer.param_groups[0]["rounding_seed"] == 6


def test_a_captured_step_follows_rate_seed_and_gradients() -> None:
    options = {"state_dtype": BRAIN, "rounding_seed": 3, "capturable": True}
    graphed, eager = train(made(**options), 0), train(made(**options), 0)
    replay = capture(graphed.step)
    if REAL:  # the seed counts up in a captured step, too: capturing does not run it
        assert same(graphed, eager)
    for seed, rate in ((1, 0.5), (2, 0.01)):
        for optimizer in (graphed, eager):
            fill(optimizer, seed)
            optimizer.param_groups[0]["lr"].fill_(rate)
        replay()
        eager.step()
        assert same(graphed, eager)
    assert graphed.param_groups[0]["rounding_seed"] == eager.param_groups[0]["rounding_seed"] == 6


def test_a_scaler_skips_a_step_that_overflows() -> None:
    ours, theirs = made(), made()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for seed in range(4):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        loss = torch.stack([(param * (seed + 1)).sum() for param in params(ours)]).sum()
        scaler.scale(loss).backward()
        if seed == 2:
            params(ours)[1].grad[3] = float("inf")
        scaler.step(ours)
        scaler.update()
        if seed != 2:
            for param in params(theirs):
                param.grad = torch.full_like(param, seed + 1)
            theirs.step()
    assert scaler.get_scale() == 512.0
    # 1,024 is a power of two: unscaling rounds nothing.
    assert same(ours, theirs)


def test_a_step_on_another_stream_is_one_of_its_work() -> None:
    ours, theirs = train(made(), 0), train(made(), 0)
    fill(ours, 1)
    with on_a_late_stream():
        ours.step()
        done = torch.cuda.Event() if REAL else None
        if done is not None:
            done.record()
    if done is not None:
        torch.cuda.current_stream().wait_event(done)
    train(ours, 2)
    train(theirs, 1, 2)
    assert same(ours, theirs)


@pytest.mark.parametrize("saved_on", ["cpu", DEVICE])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(saved_on: str) -> None:
    options = {"state_dtype": BRAIN, "rounding_seed": 5}
    whole = train(made(**options), 0, 1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = made(**options)
    with torch.no_grad():
        for ours, theirs in zip(params(resumed), params(whole), strict=True):
            ours.copy_(theirs)
    resumed.load_state_dict(torch.load(file, map_location=saved_on, weights_only=True))
    state = resumed.state[params(resumed)[0]]
    assert all(state[name].device.type == DEVICE and state[name].dtype == BRAIN for name in (EXP_AVG, EXP_AVG_ROOT))
    assert same(train(whole, 2, 3), train(resumed, 2, 3))
    assert same(train(copy.deepcopy(whole), 4), train(whole, 4))


def test_statistics_of_a_first_step_are_known() -> None:
    """|u| of a first step is (1 - beta^2)^(2/3) wherever there is a gradient, in float32 to a few roundings."""
    optimizer = made()
    optimizer.update_statistics = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    train(optimizer, 0)
    total, largest, saturated, agreeing, elements = optimizer.update_statistics.tolist()
    known = (1 - 0.95**2) ** (2 / 3)
    assert elements == sum(SIZES) == agreeing and saturated == 0
    assert largest == pytest.approx(known, rel=1e-6) and total == pytest.approx(elements * known, rel=1e-6)
