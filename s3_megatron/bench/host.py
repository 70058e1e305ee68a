"""The host's time of one step: what Python, torch and a launch take, apart from arithmetic."""

import statistics
from dataclasses import dataclass

import torch

from s3_megatron.bench.contenders import Contender
from s3_megatron.bench.timing import WARM_UP, called

TENSORS = (1, 1_000, 10_000)


@dataclass(frozen=True)
class Host:
    """One contender's host time for one number of tensors, in milliseconds."""

    tensors: int
    name: str
    ms: float


def measure(entrants: list[Contender], device: str, repeats: int) -> list[Host]:
    """Time steps over tensors of one element, where a kernel has next to nothing to do; on a GPU until it is launched.

    A time is the median of ``repeats`` rounds after three, in which the contenders take turns.
    """
    found = []
    for tensors in TENSORS:
        optimizers = [(entrant.name, entrant.make(_parameters(tensors, device))) for entrant in entrants]
        times: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
        for _ in range(WARM_UP + repeats):
            for name, optimizer in optimizers:
                if device != "cpu":
                    torch.cuda.synchronize()
                times[name].append(called(optimizer.step))
        found += [Host(tensors, name, statistics.median(seconds[WARM_UP:]) * 1e3) for name, seconds in times.items()]
    return found


def _parameters(tensors: int, device: str) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones(1, device=device)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params
