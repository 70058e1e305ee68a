"""The optimizers a step is measured for: S3 in its forms, SoftSignum, and the Adams people come from."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from s3_megatron.bench import builds
from s3_megatron.errors import first_line
from s3_megatron.optim import S3, SoftSignum

S3_BY_DEFAULT, ADAMW = "S3 p=3", "AdamW, torch fused"
type Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer by name, how to build it, and the bytes an element its algorithm has to move.

    One that takes seconds a step, or many times the weights' memory, is left out above ``largest`` parameters and
    ``most`` tensors. With the options ``capturable`` a step can be captured in a CUDA graph; None: it cannot.
    """

    name: str
    make: Make
    bytes: int
    largest: float = math.inf
    most: float = math.inf
    capturable: dict[str, bool] | None = None


def contenders(device: str) -> tuple[list[Contender], list[str]]:
    """List the optimizers that run here for float32 weights and gradients, and say why others do not."""
    # Read x, g, m, r; write x, m, r.
    full, half = 7 * 4, 3 * 4 + 4 * 2
    graph = {"capturable": True}
    s3: Callable[..., S3] = partial(S3, lr=1e-4, weight_decay=0.1)
    adamw = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.1)
    # All of them hold their states at once; a GPU of 80 GB has room for some of 10^9 weights.
    some = math.inf if device == "cpu" else 400e6
    found = [Contender(S3_BY_DEFAULT, partial(s3, p=3), full, capturable=graph)]
    found += [Contender(f"S3 p={p}", partial(s3, p=p), full, some, capturable=graph) for p in (2, 1)]
    found += [
        Contender("S3 p=3, bf16 states", partial(s3, state_dtype=torch.bfloat16), half, capturable=graph),
        Contender(
            "S3 p=3, bf16 stochastic",
            partial(s3, state_dtype=torch.bfloat16, rounding_seed=0),
            half,
            capturable=graph,
        ),
        Contender("S3 p=1.5", partial(s3, p=1.5), full, some, capturable=graph),
        Contender("S3 p=3, foreach", partial(s3, implementation="foreach"), full, largest=50e6, most=1000),
        *_softsignums(some),
        Contender(ADAMW, partial(adamw, fused=True), full, capturable=graph),
        # Megatron's and DeepSpeed's Adam on a GPU without Transformer Engine, Apex or a compiler.
        Contender("AdamW, torch foreach", partial(adamw, foreach=True), full, 50e6 if device == "cpu" else 400e6),
    ]
    missing = []
    for name, bytes_, most, find in _others(device):
        try:
            found.append(Contender(name, partial(find(), lr=1e-4, weight_decay=0.1), bytes_, some, most))
        except Exception as error:  # a package that is missing, or does not build here
            missing.append(f"{name}: {first_line(error)}")
    return found, missing


def _softsignums(some: float) -> list[Contender]:
    softsignum = partial(SoftSignum, lr=1e-4, weight_decay=0.1)
    soft = partial(softsignum, sign_iters=0, transition_iters=10**6)
    # Read x, g, m; write x, m.
    return [
        Contender("SoftSignum, hard", partial(softsignum, soft_start=1), 5 * 4, some),
        Contender("SoftSignum, soft", soft, 5 * 4),
        Contender("SoftSignum, soft, bf16 state", partial(soft, state_dtype=torch.bfloat16), 3 * 4 + 2 * 2, some),
    ]


def _others(device: str) -> Iterator[tuple[str, int, float, Callable[[], Make]]]:
    """Name, bytes an element, most tensors, and what finds the class."""
    if device == "cpu":
        yield "DeepSpeedCPUAdam", 28, math.inf, _deepspeed_cpu
        return
    yield "FusedAdam, DeepSpeed", 28, math.inf, _deepspeed_gpu
    yield "FusedAdam, Transformer Engine", 28, math.inf, _transformer_engine
    yield "FusedAdam, Apex", 28, math.inf, _apex
    # Read x, g, m, v; write x, m, v: of the states a byte each, and a scale for every block.
    yield "AdamW 8-bit, bitsandbytes", 16, 1000, _bitsandbytes
    # It compiles itself for every kind of tensor.
    yield "AdamW 8-bit, torchao", 16, 1, _torchao


def _deepspeed_cpu() -> Make:
    builds.prepare("cpu_adam")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])
    return DeepSpeedCPUAdam


def _deepspeed_gpu() -> Make:
    builds.prepare("fused_adam")
    from deepspeed.ops.adam import FusedAdam

    FusedAdam([torch.nn.Parameter(torch.zeros(1, device="cuda"))])
    return partial(FusedAdam, adam_w_mode=True)


def _bitsandbytes() -> Make:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def _torchao() -> Make:
    from torchao.optim import AdamW8bit

    return AdamW8bit


def _transformer_engine() -> Make:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam


def _apex() -> Make:
    from apex.optimizers import FusedAdam

    return FusedAdam
