"""Problems for SoftSignum's Triton step, and what the reference makes of them, with the error each may have."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s3_megatron.optim.softsignum_reference import softsignum_reference_step
from tests.kernels.by_keyword import triton
from tests.kernels.triton.triton_oracle import TINY, within

# Gradients at the edges, each with the m before it.
EDGES = [
    (0.0, 0.0),  # never touched
    (0.0, 0.5),
    (1e-30, 0.0),
    (-1e20, 1e-3),
    (1e20, -1e20),
    (1e-40, 0.0),  # m becomes a denormal: no hard step
    (0.0, 3e-45),  # faded to the last denormals: no hard step
    (0.0, -TINY * 1.2),
    (0.0, math.nan),  # a broken state stays so
    (3e38, 0.5),  # beyond half the range
    (math.nan, 0.5),
    (math.inf, 0.5),
    (-math.inf, 0.0),
]


@dataclass
class SoftProblem:
    """Rows of tensors, and the numbers of one step."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    model_params: list[Tensor] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sizes, *, param, grad, state, model=None, device="cpu", **settings) -> "SoftProblem":
        """Random rows that begin with EDGES."""
        generator = torch.Generator().manual_seed(sum(sizes) + 1)
        columns: list[list[Tensor]] = [[], [], [], []]
        for size in sizes:
            x, g, m = (torch.randn(size, generator=generator) for _ in range(3))
            for i, edge in enumerate(EDGES[:size]):
                g[i], m[i] = edge
            tensors = (x.to(param), g.to(grad), m.to(state), x.to(model or param))
            for column, tensor in zip(columns, tensors, strict=True):
                column.append(tensor.to(device))
        defaults = {"lr": torch.tensor(0.125), "beta": 0.9, "tau": 5.0, "weight_decay": 0.25, "nesterov": False}
        return cls(*columns[:3], model_params=columns[3] if model else [], settings=defaults | settings)

    @property
    def columns(self) -> tuple[list[Tensor], ...]:
        """All four, the gradients second."""
        return self.params, self.grads, self.exp_avgs, self.model_params

    def clone(self) -> "SoftProblem":
        return SoftProblem(*([x.clone() for x in column] for column in self.columns), settings=dict(self.settings))

    def move(self) -> None:
        """Run the kernel on these very tensors."""
        triton.softsignum_step_(self.params, self.grads, self.exp_avgs, model_params=self.model_params, **self.settings)

    def step(self) -> "SoftProblem":
        """Run the kernel on copies; the settings' tensors are shared and change."""
        after = self.clone()
        after.move()
        return after

    def bits(self) -> bytes:
        """Every bit a step may change, so that NaN equals itself."""
        written = [x for column in (self.params, self.exp_avgs, self.model_params) for x in column if x.numel()]
        return b"".join(x.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in written)

    def updates(self, row: int) -> Tensor:
        """The reference's update of one row, 0 where the gradient is broken; float64."""
        return _expected(self, row)[2]


def _tau(settings: dict[str, Any]) -> float:
    return math.inf if settings["tau"] > torch.finfo(torch.float32).max else settings["tau"]


def _expected(problem: SoftProblem, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, m and update in float64, and where the gradient is not broken."""
    own = problem.settings
    x, g, m = (column[row].detach().cpu().reshape(-1).double() for column in problem.columns[:3])
    scale = own.get("scale")
    g = (g.float() * (1.0 if scale is None else scale.cpu())).double() * (-1 if own.get("maximize") else 1)
    ok = g.abs() <= torch.finfo(torch.float32).max / 4
    numbers = {name: own[name] for name in ("beta", "weight_decay", "nesterov")} | {"tau": _tau(own)}
    moved, m1, u = softsignum_reference_step(x, torch.where(ok, g, 0.0), m, lr=float(own["lr"]), **numbers)
    return torch.where(ok, moved, x), torch.where(ok, m1, m), torch.where(ok, u, 0.0), ok


def check(before: SoftProblem, after: SoftProblem, *, units: float = 4.0, steps: float = 0.5) -> None:
    """Assert that ``after`` is one step from ``before``, and gradients are as they were.

    ``units`` of 2^-24 are the update's own error: tanh is right to 3 units in the last place, in the interpreter, and
    one more for tau * n. m has the roundings of two products, a difference and a sum, twice with a look-ahead: 8 units
    of the larger of |m| and |g|, on which tanh's slope of at most tau acts; a sign is either, where n is as small.
    """
    own = before.settings
    for row in range(len(before.params)):
        x, g, old = (column[row].detach().cpu().reshape(-1).double() for column in before.columns[:3])
        moved, m, _, ok = _expected(before, row)
        broken = old.isnan()
        size = torch.maximum(old.abs(), torch.where(ok, g.abs(), 0.0))
        off = ok * (8 * 2.0**-24 * size + 2.0**-148)
        n = own["beta"] * m + (1 - own["beta"]) * torch.where(ok, g, 0.0) if own["nesterov"] else m
        hard = torch.where(n.abs() > off + TINY, 0.0, 2.0)
        reach = hard if _tau(own) == math.inf else units * 2.0**-24 + (own["tau"] * off).clamp(max=2.0)
        error = ok * (float(own["lr"]) * reach + 2.0**-23 * (1 + x.abs()))
        columns = [("param", after.params, moved, error, 0.5), ("m", after.exp_avgs, m, off, steps)]
        if after.model_params:
            columns.append(("model", after.model_params, moved, error, 0.5))
            if after.params[row].dtype == torch.float32:  # to nearest even, and of the very weight that was stored
                exact = after.params[row].to(after.model_params[row].dtype)
                torch.testing.assert_close(after.model_params[row], exact, rtol=0, atol=0, equal_nan=True)
        for name, column, exact, room, ulp in columns:
            actual = column[row].detach().cpu().reshape(-1)
            moves = torch.ones_like(room) if name == "model" else ok.double()
            fine = within(actual, exact, room, steps=ulp, moves=moves) | (broken & ok & actual.isnan())
            bad = (~fine).nonzero().reshape(-1)[:5].tolist()
            assert not bad, f"{name} of row {row} at {bad}: {actual[bad].tolist()}, expected {exact[bad].tolist()}"
        assert torch.equal(after.grads[row].nan_to_num(), before.grads[row].nan_to_num()), "a gradient changed"
