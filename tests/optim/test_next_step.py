"""What an engine gives a step: it is the next one's alone."""

import pytest
import torch
from torch import Tensor, nn

from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import Step
from s3_megatron.optim import S3


def moved(*given: Step | None) -> tuple[Tensor, S3]:
    """A weight after steps of S3, each with a gradient of its own, and the optimizer."""
    param = nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = S3([param], lr=0.1, weight_decay=0.1)
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


def test_a_copy_is_written_in_one_step() -> None:
    param = nn.Parameter(torch.linspace(-1, 1, 9))
    param.grad, copy = torch.ones(9), torch.zeros(9, dtype=torch.bfloat16)
    optimizer = S3([param], lr=0.1, weight_decay=0.1)
    optimizer.next_step = Step(models={param: copy})
    optimizer.step()
    written = param.detach().bfloat16()
    assert torch.equal(copy, written)
    optimizer.step()
    assert torch.equal(copy, written) and not torch.equal(copy, param.detach().bfloat16())


def test_a_flag_keeps_everything_as_it_was() -> None:
    found, nothing = Step(found_inf=torch.ones(1)), Step(found_inf=torch.zeros(1))
    still, optimizer = moved(found)
    assert torch.equal(still, torch.linspace(-1, 1, 9))
    assert not any(state.any() for entry in optimizer.state.values() for state in entry.values())
    assert torch.equal(moved(nothing)[0], moved(None)[0])


def test_a_step_that_is_refused_takes_it_as_well() -> None:
    """Or a later one, of other gradients, would be given a factor that is not theirs."""
    _, optimizer = moved(None)
    optimizer.next_step = Step(factor=torch.full((1,), 8.0))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(S3Error, match="lr is -1"):
        optimizer.step()
    assert optimizer.next_step is None
