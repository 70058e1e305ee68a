"""Tensors for the optimizers' tests: random ones, their bits, training on random gradients, and a checkpoint's file."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; for every dtype the same, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def bits(x: Tensor) -> Tensor:
    """The bytes, in one row, so that -0.0 differs from 0.0 and NaN equals itself."""
    return x.detach().clone().contiguous().view(-1).view(torch.uint8)


def train(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take ``steps``, each with gradients of its own, the same in every run."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for x in params:
            x.grad = torch.randn(x.shape, generator=generator).to(x.dtype)
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """weights_only: whoever gets a checkpoint need not trust its pickle."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
