"""The tensors of a param group, in the columns that a kernel takes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.kernels import rows
from s3_megatron.kernels.call import STATES, Columns, Kind
from s3_megatron.kernels.metadata import Memory
from s3_megatron.optim.lookup import Lookup
from s3_megatron.optim.placement import localize

if TYPE_CHECKING:
    from s3_megatron.optim.engine_optimizer import EngineOptimizer


class Lookups:
    """Those of one step, whose groups are asked for one after another: of states, and of the model's copies."""

    def __init__(self, state: Mapping[Tensor, Any], copies: Mapping[Tensor, Tensor]) -> None:
        self.state, self.copies = Lookup(state), Lookup(copies)


def columns_of(
    optimizer: "EngineOptimizer", group: dict[str, Any], copies: Mapping[Tensor, Tensor], lookups: Lookups | None
) -> list[tuple[Columns, Memory | None]]:
    """List a group's parameters that have a gradient, gradients, states and model parameters, one device at a time.

    Rows with a model parameter, of ``copies``, and without one come apart. Beside each list is what ``rows.read``
    found, if it is as a kernel wants it. Without ``lookups``, in compiled code, tensors are looked up one by one.
    """
    # Shards come by the thousand, and a step of a small one takes a microsecond: loops are few and short here.
    params, grads = group["params"], [param.grad for param in group["params"]]
    if type(None) in set(map(type, grads)):
        params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    if not params:
        return []
    names = optimizer.spec.state_names
    kinds: tuple[Kind, ...] = ("weight", "gradient", *STATES[: len(names)])
    entries, states = _states(optimizer, params, lookups)
    models: list[Any] = []
    if copies:
        models = lookups.copies.of(params) if lookups else [copies.get(param) for param in params]
    if lookups is not None and type(None) not in set(map(type, models)):
        lists: dict[Kind, Sequence[Tensor]] = dict(zip(kinds, (params, grads, *states), strict=True))
        columns = Columns({**lists, "model weight": models} if models else lists, optimizer.format)
        memory = rows.read(columns)
        if memory is not None:
            return [(columns, memory)]
    local: list[tuple[Tensor, ...]] = list(zip(params, grads, *states, strict=True))
    if any(issubclass(kind, DTensor) for kind in set(map(type, params))):
        local = [localize(*row, names) for row in zip(params, grads, entries, strict=True)]
    parts = _apart(local, models or [None] * len(params), kinds)
    return [(Columns(part, optimizer.format), None) for part in parts]


def _states(
    optimizer: "EngineOptimizer", params: list[Tensor], lookups: Lookups | None
) -> tuple[list[Any], list[list[Tensor]]]:
    """Return the entries of parameters in the state, which get one if they have none, and each state of all."""
    names = optimizer.spec.state_names
    entries = [] if lookups is None else lookups.state.of(params)
    try:
        if sum(map(len, entries)) == len(names) * len(params):
            return entries, [[entry[name] for entry in entries] for name in names]
    except (TypeError, KeyError):  # none yet, or not this optimizer's
        pass
    entries = [optimizer.state_of(param) for param in params]
    return entries, [[entry[name] for entry in entries] for name in names]


def _apart(
    rows: list[tuple[Tensor, ...]], models: list[Tensor | None], kinds: tuple[Kind, ...]
) -> list[dict[Kind, Sequence[Tensor]]]:
    """Sort rows apart by device, and by whether they have a model parameter."""
    parts: dict[tuple[torch.device, bool], list[tuple[Tensor, ...]]] = {}
    for row, model in zip(rows, models, strict=True):
        parts.setdefault((row[0].device, model is None), []).append(row if model is None else (*row, model))
    every: tuple[Kind, ...] = (*kinds, "model weight")
    return [dict(zip(every, map(list, zip(*part, strict=True)), strict=False)) for part in parts.values()]


def seed_on(device: torch.device, seed: int | Tensor | None) -> Tensor | None:
    """The seed as a tensor there. Not as_tensor for a number: it copies from the host, which then waits for the GPU."""
    if seed is None or isinstance(seed, Tensor):
        return None if seed is None else seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)
