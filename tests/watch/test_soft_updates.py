"""What is counted of a SoftSignum step is the distance that it moved the weights."""

import pytest
import torch
from torch import nn

from s3_megatron.optim import SoftSignum
from s3_megatron.watch import statistics


@pytest.mark.parametrize("settings", [{}, {"nesterov": True}, {"maximize": True}], ids=str)
def test_softsignums_update_is_what_moved_the_weights(settings: dict[str, bool]) -> None:
    """In float64, with weight decay, in both phases; a coordinate without a finite gradient does not move."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((50, 3), (7,), (0,))]
    optimizer = SoftSignum(params, lr=0.5, weight_decay=0.1, total_steps=8, soft_start=0.5, **settings)
    optimizer.update_statistics = statistics.zeros()
    for step in range(8):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.randn_like(param) * 0.1**step
        params[0].grad[3, 1] = float("nan")
        optimizer.step()
        u = torch.cat([((a - b) / 0.5 - 0.1 * a).detach().flatten() for a, b in zip(before, params, strict=True)])
        u[10] = 0.0
        gradient = torch.cat([param.grad.flatten() for param in params])
        agreeing = (u * gradient * (-1 if settings.get("maximize") else 1) > 0).sum()
        expected = [u.abs().sum(), u.abs().max(), (u.abs() > 0.9).sum(), agreeing, u.numel()]
        # A weight of 2 that moves by 0.5 keeps 1e-15 of itself.
        torch.testing.assert_close(optimizer.update_statistics, torch.tensor(expected).double(), rtol=1e-13, atol=0.0)


def test_after_thousands_of_zero_gradients_nothing_moves() -> None:
    """m rests at a denormal, of which a hard step takes no sign."""
    param = nn.Parameter(torch.ones(1))
    optimizer = SoftSignum([param], soft_start=1.0, weight_decay=0.1)
    optimizer.update_statistics = statistics.zeros()
    for step in range(2000):
        param.grad = torch.full((1,), float(step == 0))
        optimizer.step()
    assert optimizer.update_statistics.tolist() == [0, 0, 0, 0, 1]
