"""The optimizers a step is measured for: S3 in its forms, and the Adams people come from."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from s3_megatron.optim import S3

ADAMW = "AdamW, torch fused"
type Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer by name, how to build it, and the bytes an element its algorithm has to move.

    One that takes seconds a step, and many times the weights' memory, is left out above ``largest`` parameters.
    """

    name: str
    make: Make
    bytes: int
    largest: float = math.inf


def contenders(device: str) -> tuple[list[Contender], list[str]]:
    """List the optimizers that run here for float32 weights and gradients, and say why others do not."""
    # Read x, g, m, r; write x, m, r.
    full, half = 7 * 4, 3 * 4 + 4 * 2
    s3: Callable[..., S3] = partial(S3, lr=1e-4, weight_decay=0.1)
    found = [Contender(f"S3 p={p}", partial(s3, p=p), full) for p in (3, 2, 1)]
    found += [
        Contender("S3 p=3, bf16 states", partial(s3, state_dtype=torch.bfloat16), half),
        Contender("S3 p=3, bf16 stochastic", partial(s3, state_dtype=torch.bfloat16, rounding_seed=0), half),
        Contender("S3 p=1.5", partial(s3, p=1.5), full),
        Contender("S3 p=3, foreach", partial(s3, implementation="foreach"), full, largest=50e6),
        Contender(ADAMW, partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.1, fused=True), full),
        Contender(
            "AdamW, torch foreach", partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.1, foreach=True), full, 50e6
        ),
    ]
    missing = []
    for name, find in _others(device):
        try:
            found.append(Contender(name, partial(find(), lr=1e-4, weight_decay=0.1), full))
        except Exception as error:  # a package that is missing, or does not build here
            missing.append(f"{name}: {str(error).strip().splitlines()[0]}")
    return found, missing


def _others(device: str) -> Iterator[tuple[str, Callable[[], Make]]]:
    if device == "cpu":
        yield "DeepSpeedCPUAdam", _deepspeed
    else:
        yield "FusedAdam, Transformer Engine", _transformer_engine
        yield "FusedAdam, Apex", _apex


def _deepspeed() -> Make:
    # It compiles itself by ninja, which may stand beside this Python and not on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])
    return DeepSpeedCPUAdam


def _transformer_engine() -> Make:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam


def _apex() -> Make:
    from apex.optimizers import FusedAdam

    return FusedAdam
