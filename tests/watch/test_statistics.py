"""Named sums: their order is every kernel's, and merging them is merging what they count."""

import re
from pathlib import Path

import torch

import s3_megatron.kernels
from s3_megatron.watch import statistics
from s3_megatron.watch.events import Updates

STEP_H = Path(s3_megatron.kernels.__file__).parent / "cpu/step.h"


def test_the_order_is_that_of_the_struct_in_cpp() -> None:
    """ctypes hands the memory of one to the other."""
    found = re.search(r"struct S3Statistics \{\s*double ([\w, ]+);\s*\};", STEP_H.read_text())
    assert found is not None and tuple(found[1].split(", ")) == statistics.FIELDS


def test_merging_is_counting_together() -> None:
    def of(values: torch.Tensor) -> torch.Tensor:
        signs = values.sign() == 1
        sums = [values.abs().sum(), values.abs().max(), (values.abs() > 0.9).sum(), signs.sum(), values.numel()]
        return torch.tensor(sums, dtype=torch.float64)

    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    merged = statistics.zeros(2)  # several at once, as an observer has them
    for part in values.split(33):
        statistics.merge_(merged, of(part).expand(2, -1))
    # Sums of some hundred float64 in two orders.
    torch.testing.assert_close(merged, of(values).expand(2, -1), rtol=1e-14, atol=0)


def test_what_is_not_known_is_none() -> None:
    assert statistics.updates(statistics.zeros().tolist()) == Updates()
    assert statistics.updates([5.0, 2.0, float("nan"), float("nan"), 10.0]) == Updates(mean=0.5, max=2.0)
    assert statistics.updates([5.0, 0.95, 1.0, 4.0, 10.0]) == Updates(0.5, 0.95, 0.1, 0.4)


def test_a_nan_of_one_rank_is_the_largest_too() -> None:
    """gloo's maximum of 2.0 on rank 0 and NaN on another is 2.0: a line had a mean of NaN and an ordinary maximum."""
    found = statistics.updates([float("nan"), 2.0, float("nan"), float("nan"), 10.0])
    assert found.max != found.max and found.mean != found.mean
