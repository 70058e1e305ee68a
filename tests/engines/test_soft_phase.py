"""What is logged where a soft phase begins."""

import logging

import pytest
import torch
from torch import nn

from s3_megatron.engines.soft_phase import announce
from s3_megatron.optim import SoftSignum

LINE = "SoftSignum is soft from step 3 on, for 2 steps, down to a tau of "


def train(level: int, caplog: pytest.LogCaptureFixture) -> SoftSignum:
    """Four steps, of which two are soft; what is logged from ``level`` on is in ``caplog``."""
    weight = nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = SoftSignum([weight], lr=0.1, total_steps=4, soft_start=0.5)
    optimizer.is_stepped_in_parts = True
    with caplog.at_level(level, logger="s3_megatron"):
        for _ in range(4):
            weight.grad = weight.detach().clone()
            optimizer.step()
            announce(optimizer, optimizer.end_step)
    return optimizer


def test_it_is_one_line_where_info_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    """In Megatron nothing showed that the soft phase had begun, nor from which median."""
    schedule = train(logging.WARNING, caplog).schedule
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage().startswith(LINE)
    assert record.getMessage().endswith(f"the median {schedule.mu:.4g} and the deviation {schedule.sigma:.4g}")


def test_where_info_is_shown_the_optimizers_own_line_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    train(logging.INFO, caplog)
    soft = [record for record in caplog.records if "is soft" in record.getMessage()]
    assert [record.levelno for record in soft] == [logging.INFO]
