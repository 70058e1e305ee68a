"""How far SoftMuon's map lies from the exact one, by precision and steps; and how many products it takes beside Muon.

The errors are Frobenius norms of the difference from the map by singular values in float64, relative to the map's own,
for matrices of 1.5 times as many rows as columns whose largest singular value is 1. One thread; 15 seconds.
"""

from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from s3_megatron.bench.about import about
from s3_megatron.optim.polar import SHORTEST, plan, polar, soft_polar
from s3_megatron.optim.softmuon_reference import softmuon_map
from s3_megatron.optim.temperature import Schedule

TAUS = (1.0, 8.0, 16.0, 100.0, 1e3, 1e4, 1e6, 1e9)


def spectra(columns: int) -> dict[str, Tensor]:
    """Return the singular values of the matrices that are measured."""
    index = torch.arange(columns)
    return {
        "condition 1e2": torch.logspace(0, -2, columns),
        "condition 1e4": torch.logspace(0, -4, columns),
        "condition 1e6": torch.logspace(0, -6, columns),
        "half 1, half 1e-4": torch.where(index < columns // 2, 1.0, 1e-4),
        "rank 5": torch.where(index < 5, 1.0, 0.0),
    }


def made(columns: int, values: Tensor) -> Tensor:
    """Return a float32 matrix with these singular values."""
    generator = torch.Generator().manual_seed(1)
    shapes = (columns * 3 // 2, columns), (columns, columns)
    left, right = (torch.linalg.qr(torch.randn(s, generator=generator, dtype=torch.float64))[0] for s in shapes)
    return ((left * values.double()) @ right.mT).float()


def errors(columns: int) -> list[dict[str, object]]:
    """Return a row for each spectrum and temperature."""
    rows: list[dict[str, object]] = []
    for name, values in spectra(columns).items():
        matrix = made(columns, values)
        for tau in TAUS:
            exact = softmuon_map(matrix.double(), tau)

            def error(found: Tensor, exact: Tensor = exact) -> float:
                return float(f"{((found.double() - exact).norm() / exact.norm()).item():.1e}")

            steps, precision = plan(tau, matrix.norm().item(), 1.0)
            rows.append(
                {
                    "spectrum": name,
                    "tau": tau,
                    "bf16, 8 steps": error(soft_polar(matrix, tau, SHORTEST, "medium")),
                    "fp32, 8 steps": error(soft_polar(matrix, tau, SHORTEST)),
                    "planned": f"{steps}, {'bf16' if precision == 'medium' else 'fp32'}",
                    "error": error(soft_polar(matrix, tau, steps, precision)),
                }
            )
    return rows


def work(columns: int) -> dict[str, float]:
    """Return products, and their floating-point operations beside those of Muon's hard step, for a square matrix."""
    matrix = torch.randn(columns, columns)

    def operations(steps: int) -> int:
        with FlopCounterMode(display=False) as counter:
            soft_polar(matrix, 1.0, steps) if steps else polar(matrix, 5, "quintic", "highest")
        return counter.get_total_flops()

    hard = operations(0)
    return {f"{steps} steps, {3 * steps} products": round(operations(steps) / hard, 2) for steps in (8, 12, 20)}


def phase(columns: int) -> dict[str, float]:
    """Return mean steps, and the share that is bfloat16, of a soft phase whose matrices are Gaussian throughout."""
    values = torch.linalg.svdvals(torch.randn(columns, columns, generator=torch.Generator().manual_seed(1)))
    mu = values.median()
    schedule = Schedule(mu.item(), (values - mu).abs().median().item(), 1e-4, 0, 1000, "algebraic")
    plans = [plan(schedule.tau(k, 1e9), values.norm().item(), values.max().item()) for k in range(1000)]
    coarse = sum(precision == "medium" for _, precision in plans)
    return {"mean steps": sum(steps for steps, _ in plans) / 1000, "share in bf16": coarse / 1000}


def measure(columns: int) -> dict[str, Any]:
    """Measure errors, operations and a soft phase; returns them, and what they were measured on."""
    torch.set_num_threads(1)
    found = {"errors": errors(columns), "operations": work(columns), "soft phase": phase(columns)}
    return {**about("cpu", "emerging-optimizers"), "columns": columns, **found}


def tables(measured: dict[str, Any]) -> Iterator[Table]:
    """Lay out the errors, and below them the operations and the soft phase."""
    table = Table(
        title=f"Relative error of the map, {measured['columns']} columns",
        caption=f"operations, square matrix, Muon's hard step (5 steps, 15 products) = 1: {measured['operations']}\n"
        f"a soft phase of Gaussian matrices: {measured['soft phase']}",
        caption_justify="left",
    )
    rows = measured["errors"]
    for name in rows[0]:
        table.add_column(name, justify="right" if name != "spectrum" else "left")
    for row in rows:
        table.add_row(*(f"{value:g}" if key == "tau" else str(value) for key, value in row.items()))
    yield table
