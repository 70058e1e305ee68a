"""Problems for the Triton kernel, and what Algorithm 1 in float64 makes of them, with the error each may have."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s3_megatron.optim.reference import s3_reference_step
from tests.kernels.by_keyword import triton

TINY = 2.0**-126
# Gradients at the edges, each with the (m, r) before it: see Problem.of.
EDGES = [
    (0.0, 0.0, 0.0),  # never touched
    (0.0, 0.5, 0.75),
    (0.0, -0.5, 0.75),
    (1e-30, 0.0, 0.0),
    (1e-30, -1.0, 2.0),
    (-1e20, 1e-3, 2e-3),
    (1e20, -1e20, 2e20),
    (1e-40, 0.0, 0.0),  # denormal: no step
    (0.0, 3e-45, 7e-45),  # faded to the last denormals: no step
    (3e38, 0.5, 0.75),  # beyond half the range
    (float("nan"), 0.5, 0.75),
    (float("inf"), 0.5, 0.75),
    (-float("inf"), 0.0, 0.0),
]


@dataclass
class Problem:
    """Rows of tensors, and the hyperparameters of one step."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_roots: list[Tensor]
    model_params: list[Tensor] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sizes, *, param, grad, state, model=None, device="cpu", **settings) -> "Problem":
        """Random rows that begin with EDGES; |m| <= r, as every run of S3 keeps it."""
        generator = torch.Generator().manual_seed(sum(sizes) + 1)
        columns: list[list[Tensor]] = [[], [], [], [], []]
        for size in sizes:
            x, g = (torch.randn(size, generator=generator) for _ in range(2))
            r = torch.rand(size, generator=generator) + 0.01
            m = r * (2 * torch.rand(size, generator=generator) - 1)
            for i, edge in enumerate(EDGES[:size]):
                g[i], m[i], r[i] = edge
            tensors = (x.to(param), g.to(grad), m.to(state), r.to(state), x.to(model or param))
            for column, tensor in zip(columns, tensors, strict=True):
                column.append(tensor.to(device))
        defaults = {"lr": torch.tensor(0.125), "beta1": 0.95, "beta2": 0.95, "p": 3.0, "weight_decay": 0.25}
        settings = defaults | {"nesterov": True} | settings
        return cls(*columns[:4], model_params=columns[4] if model else [], settings=settings)

    @property
    def columns(self) -> tuple[list[Tensor], ...]:
        """All five, the gradients second."""
        return self.params, self.grads, self.exp_avgs, self.exp_avg_roots, self.model_params

    def clone(self) -> "Problem":
        return Problem(*([x.clone() for x in column] for column in self.columns), settings=dict(self.settings))

    def step(self) -> "Problem":
        """Run the kernel on copies; the settings' tensors are shared and change."""
        after = self.clone()
        triton.s3_step_(
            after.params,
            after.grads,
            after.exp_avgs,
            after.exp_avg_roots,
            model_params=after.model_params,
            **after.settings,
        )
        return after

    def bits(self) -> bytes:
        """Every bit a step may change, so that NaN equals itself."""
        columns = (self.params, self.exp_avgs, self.exp_avg_roots, self.model_params)
        return b"".join(
            x.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for c in columns for x in c if x.numel()
        )


@dataclass
class Expected:
    """Float64 results of one row and the absolute error that each coordinate may have before it is stored."""

    param: Tensor
    m: Tensor
    r: Tensor
    update: Tensor
    ok: Tensor
    param_error: Tensor
    m_error: Tensor
    r_error: Tensor


def expected(problem: Problem, row: int, *, units: float = 4.0) -> Expected:
    """Algorithm 1 on one row.

    ``units``, of 2^-24, measured over 60,000 elements and every p in the interpreter: m 1.9 (three roundings, and those
    of beta and 1 - beta), r 2.8 (powers, their weights and the sum, divided by p; the root; a product). The update is
    n/b: errors of both, in proportion to (beta^2 |m| + (1 - beta^2)|g|)/b, and its own: 2.2.
    """
    hp = problem.settings
    x, g, m, r = (
        column[row].detach().cpu().reshape(-1).double()
        for column in (problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_roots)
    )
    scale = hp.get("scale")
    g = (g.float() * (1.0 if scale is None else scale.cpu())).double() * (-1 if hp.get("maximize") else 1)
    ok = g.abs() <= torch.finfo(torch.float32).max / 4
    safe = torch.where(ok, g, 0.0)
    # Scaling changes nothing, and in float64 1e20^8 and 1e-40^8 would leave the range of exact numbers.
    unit = torch.maximum(safe.abs(), r)
    unit = torch.where(unit == 0, 1.0, unit)
    betas = {"beta1": hp["beta1"], "beta2": hp["beta2"]}
    _, m1, s1, u = s3_reference_step(
        x, safe / unit, m / unit, (r / unit) ** hp["p"], lr=0.0, p=hp["p"], nesterov=hp["nesterov"], **betas
    )
    ahead = hp["beta2"] * s1 + (1 - hp["beta2"]) * (safe.abs() / unit) ** hp["p"] if hp["nesterov"] else s1
    b = unit * ahead ** (1 / hp["p"])
    stands = b < TINY
    u = torch.where(stands | ~ok, 0.0, u)
    if hp["beta1"] == hp["beta2"]:
        u = u.clamp(-1, 1)
    lr, decay = float(hp["lr"]), hp["weight_decay"]
    moved = x - lr * (u + decay * x)
    eps = units * 2.0**-24
    weight = hp["beta1"] ** (2 if hp["nesterov"] else 1)
    reach = torch.where(stands, 0.0, (weight * m.abs() + (1 - weight) * safe.abs()) / b)
    moves = ok.double()  # a broken gradient keeps its bits: no error at all
    return Expected(
        param=torch.where(ok, moved, x),
        m=torch.where(ok, m1 * unit, m),
        r=torch.where(ok, s1 ** (1 / hp["p"]) * unit, r),
        update=u,
        ok=ok,
        param_error=moves * (eps * x.abs() + lr * (2 * eps * reach + eps * u.abs())),
        m_error=moves * eps * torch.maximum(m.abs(), safe.abs()),
        # Below 2^-126 the kernel no longer scales numbers up to 1, and their powers underflow: r fades to 0 there,
        # where it is used no more.
        r_error=moves * torch.where(unit < TINY, TINY * 2 ** (-120 / hp["p"]), eps * unit),
    )


def within(actual: Tensor, exact: Tensor, error: Tensor, *, steps: float = 0.5, moves: Tensor) -> Tensor:
    """Whether each stored number is within ``error`` and, where it moves, the rounding (in ulp) of its dtype."""
    info = torch.finfo(actual.dtype)
    actual = actual.detach().cpu().reshape(-1).double()
    # float32 has its roundings in ``error``, except for the last denormals.
    rounding = 0.0 if info.dtype == "float32" else steps * info.eps
    room = error + moves * (rounding * (exact.abs() + error) + 2 * steps * info.smallest_normal * info.eps)
    overflows = (exact.abs() + room > info.max) & actual.isinf()
    return ((actual - exact).abs() <= room) | overflows


def check(before: Problem, after: Problem, *, units: float = 4.0, steps: float = 0.5) -> None:
    """Assert that ``after`` is one step from ``before``, and gradients are as they were."""
    for row in range(len(before.params)):
        want = expected(before, row, units=units)
        columns = [
            ("param", after.params[row], want.param, want.param_error, 0.5),
            ("m", after.exp_avgs[row], want.m, want.m_error, steps),
            ("r", after.exp_avg_roots[row], want.r, want.r_error, steps),
        ]
        if after.model_params:
            columns.append(("model", after.model_params[row], want.param, want.param_error, 0.5))
            if after.params[row].dtype == torch.float32:  # to nearest even, and of the very weight that was stored
                exact = after.params[row].to(after.model_params[row].dtype)
                assert torch.equal(after.model_params[row], exact), "the model's weight is not the rounded weight"
        for name, actual, exact, error, ulp in columns:
            moves = torch.ones_like(error) if name == "model" else want.ok.double()
            fine = within(actual, exact, error, steps=ulp, moves=moves)
            bad = (~fine).nonzero().reshape(-1)[:5].tolist()
            flat = actual.detach().cpu().reshape(-1)
            assert not bad, f"{name} of row {row} at {bad}: {flat[bad].tolist()}, expected {exact[bad].tolist()}"
        assert torch.equal(after.grads[row].nan_to_num(), before.grads[row].nan_to_num()), "a gradient changed"
