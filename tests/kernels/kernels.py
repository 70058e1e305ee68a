"""The kernels that run on a CPU, by name and under one signature, for tests that hold them all to one oracle."""

from typing import Any

import torch
from torch import Tensor

from s3_megatron.kernels.cpu import library
from tests.kernels.by_keyword import cpu, foreach


def cpp(loop: int):
    """The C++ kernel with one of its loops; lr may be a number, and rows may differ in dtype, as in foreach."""

    def s3_step_(params: list[Tensor], grads, exp_avgs, exp_avg_roots, *, lr, model_params=(), **rest: Any) -> None:
        lr = torch.as_tensor(lr, dtype=torch.float64)
        if exp_avgs[0].dtype == torch.float64:
            # Not for these loops: op.py sends float64 to foreach.
            foreach.s3_step_(params, grads, exp_avgs, exp_avg_roots, lr=lr, model_params=model_params, **rest)
            return
        for i, row in enumerate(zip(params, grads, exp_avgs, exp_avg_roots, strict=True)):
            columns = [[x] for x in row]
            cpu.s3_step_(*columns, lr=lr, model_params=model_params[i : i + 1], loop=loop, **rest)

    return s3_step_


# The first of a machine's loops is the one that runs there; the others run on other machines.
KERNELS = {"foreach": foreach.s3_step_} | {name: cpp(index) for index, name in enumerate(library.loops())}
