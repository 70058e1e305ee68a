"""What an engine gives a step: it is the next one's alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import Step
from s3_megatron.optim import S3, EngineOptimizer, SoftSignum


def softsignum(params: list[nn.Parameter], **settings: float) -> SoftSignum:
    """One that is soft from the second step on."""
    return SoftSignum(params, sign_iters=1, transition_iters=9, **settings)


def moved(*given: Step | None, make: Callable[..., EngineOptimizer] = S3) -> tuple[Tensor, EngineOptimizer]:
    """A weight after steps, each with a gradient of its own, and the optimizer."""
    param = nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = make([param], lr=0.1, weight_decay=0.1)
    for number, step in enumerate(given):
        param.grad = torch.randn(9, generator=torch.Generator().manual_seed(number))
        optimizer.next_step = step
        optimizer.step()
    return param.detach(), optimizer


def test_a_factor_holds_for_one_step() -> None:
    """Another size of one gradient moves the next step's m and r; by 2^3 of both, S3's steps are the same."""
    factor = Step(factor=torch.full((1,), 8.0))
    once, optimizer = moved(factor, None)
    twice, _ = moved(factor, factor)
    plain, _ = moved(None, None)
    assert optimizer.next_step is None
    assert torch.equal(twice, plain) and not torch.equal(once, plain)


def test_softsignum_takes_a_factor_for_one_step() -> None:
    """Its soft steps depend on the gradients' size: by 8 it is the run whose gradients are 8 times as large."""
    factor = Step(factor=torch.full((1,), 8.0))
    once, optimizer = moved(factor, None, make=softsignum)
    twice, scaled = moved(factor, factor, make=softsignum)
    plain, other = moved(None, None, make=softsignum)
    assert optimizer.next_step is None and not torch.equal(once, plain) and not torch.equal(once, twice)
    (m,), (its,) = ([entry["exp_avg"] for entry in each.state.values()] for each in (scaled, other))
    assert torch.equal(m, 8 * its) and scaled.schedule.sigma == 8 * other.schedule.sigma


@pytest.mark.parametrize("make", [S3, softsignum])
def test_a_weight_without_a_copy_moves_beside_one_that_has_it(make: Callable[..., EngineOptimizer]) -> None:
    """A model in bfloat16 has float32 weights as well, norms or routers, which are their own copies."""
    params = [nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2)]
    copy = torch.zeros(9, dtype=torch.bfloat16)
    optimizer = make(params, lr=0.1, weight_decay=0.1)
    for param in params:
        param.grad = torch.randn(9, generator=torch.Generator().manual_seed(0))
    optimizer.next_step = Step(models={params[0]: copy})
    optimizer.step()
    expected, _ = moved(None, make=make)
    assert torch.equal(params[0], expected) and torch.equal(params[1], expected)
    assert torch.equal(copy, expected.bfloat16())


@pytest.mark.parametrize("make", [S3, softsignum])
def test_a_copy_is_written_in_one_step(make: Callable[..., EngineOptimizer]) -> None:
    param = nn.Parameter(torch.linspace(-1, 1, 9))
    param.grad, copy = torch.ones(9), torch.zeros(9, dtype=torch.bfloat16)
    optimizer = make([param], lr=0.1, weight_decay=0.1)
    optimizer.next_step = Step(models={param: copy})
    optimizer.step()
    written = param.detach().bfloat16()
    assert torch.equal(copy, written)
    optimizer.step()
    assert torch.equal(copy, written) and not torch.equal(copy, param.detach().bfloat16())


@pytest.mark.parametrize("make", [S3, softsignum])
def test_a_flag_keeps_everything_as_it_was(make: Callable[..., EngineOptimizer]) -> None:
    found, nothing = Step(found_inf=torch.ones(1)), Step(found_inf=torch.zeros(1))
    still, optimizer = moved(found, make=make)
    assert torch.equal(still, torch.linspace(-1, 1, 9)) and optimizer.next_step is None
    assert not any(state.any() for entry in optimizer.state.values() for state in entry.values())
    assert torch.equal(moved(nothing, make=make)[0], moved(None, make=make)[0])


def test_softsignums_schedule_stands_still_where_a_flag_says_so() -> None:
    """The step that would begin the soft phase, and one in it; each is then taken as if nothing had been."""
    found, n = Step(found_inf=torch.ones(1)), None
    _, optimizer = moved(n, found, n, found, make=softsignum)
    assert optimizer.param_groups[0]["steps_taken"] == 2 and optimizer.schedule.first == 1


@pytest.mark.parametrize("make", [S3, softsignum])
def test_a_step_that_is_refused_takes_it_as_well(make: Callable[..., EngineOptimizer]) -> None:
    """Or a later one, of other gradients, would be given a factor that is not theirs."""
    _, optimizer = moved(None, make=make)
    optimizer.next_step = Step(factor=torch.full((1,), 8.0))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(S3Error, match="lr is -1"):
        optimizer.step()
    assert optimizer.next_step is None
