"""What schedulers and callbacks write into S3's param groups: |u| <= 1 holds, or one line says that it does not."""

import logging
import math

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as schedulers

from s3_megatron.errors import S3Error
from s3_megatron.optim import S3, settings

LR, DECAY, STEPS = 1e-3, 0.1, 30


@pytest.fixture(autouse=True)
def first_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_has_warned", False)


def largest_update(optimizer: S3, param: Tensor, after_step=lambda: None) -> float:
    """The largest |u| of a run in which one sign of the gradient is followed by the other."""
    optimizer.update_statistics = torch.zeros(5, dtype=torch.float64)
    largest = 0.0
    for step in range(STEPS):
        param.grad = torch.full_like(param, 1.0 if step < STEPS // 2 else -10.0)
        optimizer.step()
        largest = max(largest, float(optimizer.update_statistics[1]))
        after_step()
    return largest


def made(**settings) -> tuple[S3, Tensor]:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 37))
    return S3([param], **{"lr": LR, "weight_decay": DECAY, **settings}), param


CYCLING = {
    "OneCycleLR": lambda optimizer, **more: schedulers.OneCycleLR(optimizer, LR, total_steps=STEPS + 1, **more),
    "CyclicLR": lambda optimizer, **more: schedulers.CyclicLR(optimizer, LR / 10, LR, step_size_up=5, **more),
}


@pytest.mark.parametrize("name", CYCLING)
def test_a_scheduler_that_cycles_momentum_is_logged_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It writes the first beta as Adam's momentum, 0.85 to 0.95: a weight silently moved by more than lr."""
    optimizer, param = made(beta=0.99)
    scheduler = CYCLING[name](optimizer)
    assert largest_update(optimizer, param, scheduler.step) > 1
    (line,) = caplog.messages
    assert "S3 steps with two betas" in line and "cycle_momentum=False" in line and "\n" not in line


@pytest.mark.parametrize("name", CYCLING)
def test_what_that_line_advises_keeps_the_bound(name: str, caplog: pytest.LogCaptureFixture) -> None:
    optimizer, param = made(beta=0.99)
    scheduler = CYCLING[name](optimizer, cycle_momentum=False)
    assert 0 < largest_update(optimizer, param, scheduler.step) <= 1
    assert optimizer.param_groups[0]["betas"] == (0.99, 0.99) and caplog.messages == []


def test_one_beta_that_changes_keeps_the_bound(caplog: pytest.LogCaptureFixture) -> None:
    """|m| <= r survives any step with one beta, whatever it was before."""
    optimizer, param = made()
    betas = iter(torch.linspace(0.5, 0.999, STEPS).tolist())

    def write() -> None:
        beta = next(betas)
        optimizer.param_groups[0]["betas"] = (beta, beta)

    assert 0 < largest_update(optimizer, param, write) <= 1
    assert caplog.messages == []


def test_decay_and_p_that_change_keep_the_bound(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, param = made()

    def write() -> None:
        optimizer.param_groups[0]["weight_decay"] *= 1.1
        optimizer.param_groups[0]["p"] += 0.5

    before = param.detach().clone()
    assert 0 < largest_update(optimizer, param, write) <= 1
    assert caplog.messages == [] and not torch.equal(param, before)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.99, 0.9)], ids=str)
@pytest.mark.parametrize("door", ["argument", "group", "checkpoint", "written"])
def test_two_betas_are_logged_whichever_way_they_come(
    door: str, betas: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    optimizer, param = made(**({"betas": betas} if door == "argument" else {}))
    if door == "group":
        optimizer.add_param_group({"params": [other := torch.nn.Parameter(torch.ones(3))], "betas": betas})
        other.grad = torch.ones(3)
    elif door == "checkpoint":
        optimizer.load_state_dict(made(betas=betas)[0].state_dict())
    elif door == "written":
        optimizer.param_groups[0]["betas"] = [*betas]
    largest_update(optimizer, param)
    (line,) = [line for line in caplog.messages if "S3 steps with two betas" in line]
    assert f"{betas[0]} and {betas[1]}" in line


def test_one_rank_logs_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    largest_update(*made(betas=(0.9, 0.99)))
    assert caplog.messages == []


@pytest.mark.parametrize("betas", [(1.045, 0.99), (0.95, 1.0), (-0.1, -0.1), (math.nan, math.nan)])
def test_a_beta_out_of_range_is_refused_in_the_step(betas: tuple[float, float]) -> None:
    """DeepSpeed's OneCycle lets Adam's first beta grow past 1 where it is to decay (its pull request 8589)."""
    optimizer, param = made()
    optimizer.param_groups[0]["betas"] = betas
    before = param.detach().clone()
    with pytest.raises(S3Error, match=r"betas are .*both must lie in \[0, 1\)"):
        largest_update(optimizer, param)
    assert torch.equal(param, before)


@pytest.mark.parametrize("p", [0.0, 0.5, float("nan"), float("inf")])
def test_a_p_out_of_range_is_refused_in_the_step(p: float) -> None:
    """Incident: with p of 0 or NaN written into a group no weight moved, and nothing was logged."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = S3([weight], weight_decay=0.1)
    optimizer.param_groups[0]["p"] = p
    with pytest.raises(S3Error, match="a param group's p is"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3)) and not optimizer.state


def test_a_compiled_step_logs_it_too(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, param = made(betas=(0.9, 0.99))
    param.grad = torch.ones_like(param)
    with caplog.at_level(logging.WARNING, logger=settings.__name__):
        torch.compile(optimizer.step, backend="eager")()
    assert [line for line in caplog.messages if "two betas" in line]


BAD_SIZES = [-1e-9, math.nan, math.inf, torch.tensor(-1.0), torch.tensor(math.nan)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bad", BAD_SIZES, ids=str)
def test_a_rate_out_of_range_is_refused_in_the_step(bad: float | Tensor, compiled: bool) -> None:
    """A schedule that ran below 0 silently moved every weight up the slope; AdamW takes it as well."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = S3([{"params": [first]}, {"params": [second]}], lr=LR, weight_decay=DECAY)
    optimizer.param_groups[1]["lr"] = bad
    for param in (first, second):
        param.grad = torch.ones(3)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    # An error in a compiled step leaves autograd as it is within (torch 2.13).
    with torch.enable_grad(), pytest.raises(S3Error, match=r"lr is .*: it must be a finite number >= 0") as refused:
        step()
    assert "\n" not in str(refused.value) and torch.equal(second, torch.ones(3))
    assert compiled or torch.equal(first, torch.ones(3)), "the group before it must not have moved"


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_weight_decay_out_of_range_is_refused_in_the_step(bad: float) -> None:
    """NaN, as a schedule of 0/0 writes it, made every weight NaN."""
    optimizer, param = made()
    optimizer.param_groups[0]["weight_decay"] = bad
    before = param.detach().clone()
    with pytest.raises(S3Error, match=r"weight_decay is .*finite number >= 0"):
        largest_update(optimizer, param)
    assert torch.equal(param, before)


def test_adamw_takes_a_rate_below_zero() -> None:
    """The control: torch looks at a rate in the constructor alone."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], lr=LR, weight_decay=0)
    optimizer.param_groups[0]["lr"] = -LR
    param.grad = torch.ones(3)
    optimizer.step()
    assert bool((param > 1).all())
