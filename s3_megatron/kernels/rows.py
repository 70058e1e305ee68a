"""Tensors with strides, for kernels that know none."""

from collections.abc import Sequence

import torch
from torch import Tensor

type Columns = list[Sequence[Tensor]]


def straighten(columns: Columns) -> Columns:
    """Return the columns with contiguous tensors: a column itself, or one with copies of those that are not."""
    # Unbound methods: a thousand small shards take longer to list than to move.
    return [
        column if all(map(Tensor.is_contiguous, column)) else [x.contiguous() for x in column] for column in columns
    ]


def put_back(columns: Columns, straight: Columns) -> None:
    """Copy what a kernel wrote to the copies (modifies the weights, states and model weights; not the gradients)."""
    for index, (originals, used) in enumerate(zip(columns, straight, strict=True)):
        if used is not originals and index != 1:
            torch._foreach_copy_(list(originals), list(used))
