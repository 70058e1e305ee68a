"""What the interpreter's cases step: sizes, dtypes by place, and rows in other orders of memory."""

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = (0, 1, 15, 16, 17, 1025)


def by_place(types):
    """Name the dtypes of weight, gradient, state and model weight."""
    return dict(zip(("param", "grad", "state", "model"), types, strict=True))


def with_strides(problem):
    """Add a transposed row and one that begins at an odd element."""
    for column in problem.columns:
        if column:
            long = column[-1]
            column += [long[:63].clone().view(9, 7).t(), long[:101].clone()[1:]]
    return problem
