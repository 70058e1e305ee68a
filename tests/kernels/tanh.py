"""How near a kernel's tanh(tau * n) must be."""

import math

import torch
from torch import Tensor


def check_tanh(n: Tensor, tau: float, u: Tensor, opposite: Tensor) -> None:
    """Check ``u``, the update of ``n`` >= 0, and ``opposite``, of -n.

    3 units in the last place (2.5 were seen), one more where tau * n is itself rounded; odd to the bit, at most 1, and
    0 for 0 alone and for what is beyond a quarter of the range.
    """
    kept = n <= torch.finfo(torch.float32).max / 4
    # The float32 tau is what the step has.
    product = n.double() * torch.tensor(tau).double()
    expected = product.tanh()
    unit = torch.nextafter(expected.float(), torch.tensor(math.inf)).double() - expected.float().double()
    slack = 3 + (0 if tau == 1.0 else 1)
    assert ((u.double() - expected).abs() <= slack * unit)[kept].all()
    assert torch.equal(u, -opposite) and (u <= 1).all()
    assert torch.equal(u == 0, (n == 0) | ~kept)
    assert (u[kept & (product > 9.02)] == 1).all()
