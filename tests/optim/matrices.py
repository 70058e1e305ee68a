"""Matrices, and steps that an optimizer of matrices takes on them."""

import torch

LR, DECAY = 0.05, 0.1
SHAPES = [(12, 8), (8, 12), (8, 8), (1, 6), (6, 1)]


def matrices(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def train(optimizer, steps, size=1e-2):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for group in optimizer.param_groups:
            for x in group["params"]:
                x.grad = (torch.randn(x.shape, generator=generator) * size).to(x.dtype)
        optimizer.step()
