"""Golden vectors: numbers that were computed elsewhere, for a stream of six gradients."""

import pytest
import torch

from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT
from s3_megatron.optim.reference import reference_updates, s3_reference_step

GRADIENTS = (1.0, -2.0, 0.5, 0.0, 3.0, 3.0)
GOLDEN = {  # (beta, p): n/b at each step
    (0.95, 1): "1.000000000000 -0.624154086413 0.007526031822 -0.150643451930 0.624715526826 0.724814459004",
    (
        0.95,
        1.5,
    ): "0.460258204126 -0.319756277026 0.003937250583 -0.070964850914 0.352177112567 0.436730134781",
    (0.95, 2): "0.312249899920 -0.227207246188 0.002749937217 -0.047488609184 0.259759373026 0.334456520505",
    (0.95, 3): "0.211837614465 -0.159792336656 0.001833468482 -0.030745123297 0.187971644400 0.252593727766",
    (0.9, 3): "0.330498176243 -0.255588167583 0.006509304886 -0.045610717783 0.298693523535 0.392884362754",
}
# beta .95, p 3, after the last step
M, S = 0.271172796875, 3.002350140625

VECTORS = pytest.mark.parametrize(
    ("beta", "p", "expected"),
    [
        (beta, p, torch.tensor([float(x) for x in row.split()], dtype=torch.float64))
        for (beta, p), row in GOLDEN.items()
    ],
)


@VECTORS
def test_the_reference_gives_the_golden_vectors(beta, p, expected):
    """To 1e-12: they are printed to 12 decimals, so half of that is their own rounding."""
    stream = [torch.tensor(g, dtype=torch.float64) for g in GRADIENTS]
    updates = torch.stack(list(reference_updates(stream, beta1=beta, beta2=beta, p=p)))
    torch.testing.assert_close(updates, expected, rtol=0, atol=1e-12)


# float32: the largest update is 1, and its rounding (6e-8), that of six steps of state and twice that of the weight
# stay under 1e-6.
@VECTORS
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_optimizer_gives_the_golden_vectors(applied_updates, beta, p, expected, dtype, atol):
    updates, _ = applied_updates(torch.tensor(GRADIENTS, dtype=dtype), beta=beta, p=p)
    torch.testing.assert_close(updates, expected, rtol=0, atol=atol)


def test_the_references_state_is_the_golden_one():
    x = m = s = torch.zeros((), dtype=torch.float64)
    for g in GRADIENTS:
        x, m, s, _ = s3_reference_step(x, torch.tensor(g, dtype=torch.float64), m, s, lr=1.0, weight_decay=0.1)
    assert m.item() == pytest.approx(M, abs=1e-12)
    assert s.item() == pytest.approx(S, abs=1e-12)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_optimizer_keeps_m_and_the_root_of_s(applied_updates, dtype, atol):
    _, state = applied_updates(torch.tensor(GRADIENTS, dtype=dtype))
    assert state[EXP_AVG].item() == pytest.approx(M, abs=atol)
    assert state[EXP_AVG_ROOT].item() == pytest.approx(S ** (1 / 3), abs=atol)
