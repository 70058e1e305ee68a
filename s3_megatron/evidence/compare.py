"""``s3-megatron compare``: runs an experiment's cells, the most valuable first, until they are done or time is over."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from s3_megatron.errors import S3Error
from s3_megatron.evidence import text
from s3_megatron.evidence.cells import Cell, CellsFile
from s3_megatron.evidence.experiments import Experiment, Setup
from s3_megatron.evidence.plan import Plan
from s3_megatron.evidence.workers import Workers
from s3_megatron.jobs.progress import run_line

SLACK = 1.1  # a stack is started if so many times its expected time is left
MOST_MEMBERS = 128


@dataclass
class Costs:
    """Seconds of a step of one member, by setup and optimizer, as measured here."""

    members: int
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def of(self, cells: Sequence[Cell]) -> float:
        """Expect the seconds of a stack: nothing where its kind was not measured."""
        return sum(self.seconds.get(kind(cell), 0.0) * cell.setup.steps for cell in cells)


def kind(cell: Cell) -> tuple[str, str]:
    """What cells of one stack share."""
    return cell.setup_name, cell.optimizer


def stacks(cells: Iterable[Cell], members: int) -> Iterator[list[Cell]]:
    """Put cells into stacks of so many at most, the first cell in the first stack."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(kind(cell), []).append(cell)
    for group in groups.values():
        for some in itertools.batched(group, members):
            yield sorted(some, key=lambda cell: (cell.contender, cell.configuration))  # equals side by side


def members_that_fit(setups: Iterable[Setup], device: str) -> int:
    """Estimate how many members a stack may have.

    On a CPU, one: a stack of 4 was 6% faster a member there, one of 16 slower, and a kill loses more.
    """
    if device == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info()
    # Weights, gradients, two states, and copies for |u|; a token's activations: some 40 widths a block, and its logits.
    largest = max(
        4 * (7 * s.model.parameters() + s.batch * s.length * (40 * s.layers * s.width + 4 * s.model.vocabulary))
        for s in setups
    )
    if free * 0.8 < largest:
        raise S3Error(f"a member needs about {largest / 2**30:.1f} GiB, and the GPU has {free / 2**30:.1f} free")
    return min(MOST_MEMBERS, int(free * 0.8 / largest))


def compare(
    experiment: Experiment,
    folder: Path,
    console: Console,
    *,
    device: str,
    minutes: float,
    workers: int,
    dry_run: bool = False,
) -> bool:
    """Run what is not finished, until it is or so many minutes are over; returns whether the experiment is whole.

    Raises:
        S3Error: the folder is in use or of another experiment, or the text or the device is not here.
    """
    deadline = time.monotonic() + 60 * minutes
    plan = Plan(experiment, text.load(experiment.text).sha256)
    members = members_that_fit(experiment.setups.values(), device)
    with Workers(workers, experiment.text, device, deadline) as pool:
        if dry_run:
            console.print(budget(plan, _probe(plan, pool, members), workers))
            return False
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                cells = CellsFile(folder / "cells.jsonl", experiment, plan.text)
                if not plan.ready(cells.results):
                    return True
                costs = _probe(plan, pool, members)
                console.print(budget(plan, costs, workers))
                _run(plan, pool, cells, costs, deadline, console)
        except Timeout:
            raise S3Error(f"another comparison writes into {folder}: wait for it, or give another by --out") from None
    return not plan.ready(cells.results)


def _probe(plan: Plan, pool: Workers, members: int) -> Costs:
    """Time the first steps of each kind of stack, on all workers at once as later."""
    waiting: dict[tuple[str, str], list[Cell]] = {}
    for name, setup in plan.pairs():
        entry = plan.experiment.contenders[name]
        cell = plan.cell(name, setup, (entry.rates[0], "{}"), plan.experiment.seeds[0])
        waiting.setdefault(kind(cell), [cell] * members)
    costs, todo = Costs(members), list(waiting.values())
    while todo or pool.cells:
        while todo and pool.free:
            pool.probe(todo.pop())
        for cells, seconds in pool.finished(1.0):
            costs.seconds[kind(cells[0])] = seconds / len(cells)
    return costs


def budget(plan: Plan, costs: Costs, workers: int) -> Table:
    """Lay out what the whole experiment takes here."""
    table = Table(title=f"{plan.experiment.name}: {plan.experiment.title}", title_justify="left", box=None)
    for heading in ("setup", "cells", "operations", "ms a step", "minutes here"):
        table.add_column(heading, justify="left" if heading == "setup" else "right")
    for name, count in plan.total().items():
        setup = plan.experiment.setups[name]
        seconds = [s for (its, _), s in costs.seconds.items() if its == name]
        mean = sum(seconds) / len(seconds)
        operations = count * setup.model.operations(setup.steps * setup.batch * setup.length)
        minutes = count * setup.steps * mean / workers / 60
        table.add_row(name, str(count), f"{operations:.1e}", f"{1e3 * mean:.1f}", f"{minutes:.1f}")
    return table


def _run(plan: Plan, pool: Workers, file: CellsFile, costs: Costs, deadline: float, console: Console) -> None:
    """Train stacks until none is left, or none fits into the time."""
    total = sum(count * plan.experiment.setups[name].steps for name, count in plan.total().items())
    began: dict[str, float] = {}
    ready = plan.ready(file.results)
    with run_line(console, plan.experiment.name, total) as line:
        while True:
            taken = {cell.key for cell in pool.cells}
            for stack in stacks([cell for cell in ready if cell.key not in taken], costs.members):
                if pool.free and time.monotonic() + SLACK * costs.of(stack) < deadline:
                    pool.train(stack)
                    began[stack[0].key] = time.monotonic()
            if not pool.cells:
                return
            for cells, results in pool.finished(1.0):
                if results is None:
                    continue
                file.add(results)
                took = time.monotonic() - began[cells[0].key]
                costs.seconds[kind(cells[0])] = took / len(cells) / cells[0].setup.steps
                ready = plan.ready(file.results)
            done = sum(plan.experiment.setups[result["setup"]].steps for result in file.results.values())
            line.advance(
                done + pool.steps, f"{len(file.results)} cells, {pool.cells[0].contender if pool.cells else ''}"
            )
