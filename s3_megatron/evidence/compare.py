"""``s3-megatron compare``: runs an experiment's cells, the most valuable first, until they are done or time is over."""

import itertools
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from s3_megatron import machine
from s3_megatron.errors import S3Error
from s3_megatron.evidence import settings, text, unfinished
from s3_megatron.evidence.cells import Cell, CellsFile
from s3_megatron.evidence.contenders import CONTENDERS
from s3_megatron.evidence.experiments import Experiment, Setup
from s3_megatron.evidence.plan import Plan, dumps
from s3_megatron.evidence.workers import ENDINGS, Workers, file_of
from s3_megatron.jobs.progress import print_line, share_line

SLACK = 1.1  # a stack is taken to end in time if so many times its expected time is left
MOST_MEMBERS = 128
MOST_NAMES = 3  # of contenders in a line of progress


@dataclass
class Costs:
    """Seconds of a stack's step by the stack's kind and number of members, as measured here."""

    members: int  # of a stack at most
    seconds: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)

    def add(self, stack: Sequence[Cell], seconds: float) -> None:
        """Take down what a step of a stack took."""
        self.seconds.setdefault(kind(stack[0]), {})[len(stack)] = seconds

    def of(self, stack: Sequence[Cell]) -> float:
        """Expect the seconds of a stack: nothing where its kind was not measured."""
        return self.step(kind(stack[0]), len(stack)) * stack[0].setup.steps

    def step(self, its: tuple[str, str], members: int) -> float:
        """Expect the seconds of a step: straight lines between the sizes measured, in proportion beyond them."""
        known = sorted(self.seconds.get(its, {}).items())
        below = [point for point in known if point[0] <= members]
        above = [point for point in known if point[0] >= members]
        if not below or not above:
            size, seconds = known[-1] if below else known[0] if above else (members, 0.0)
            return seconds * max(1.0, members / size)
        (low, least), (high, most) = below[-1], above[0]
        return least if low == high else least + (most - least) * (members - low) / (high - low)


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


def members_that_fit(setups: Iterable[Setup], device: str, workers: int) -> int:
    """Estimate how many members a stack may have, beside those of the other workers.

    On a CPU, one: a stack of 4 was 6% faster a member there, one of 16 slower, and a kill loses more.
    """
    if device == "cpu":
        return 1
    free = torch.cuda.mem_get_info()[0] * 0.8 / workers
    # Weights, gradients, two states, and copies for |u|; a token's activations: some 40 widths a block, and its logits.
    largest = max(
        4 * (7 * s.model.parameters() + s.batch * s.length * (40 * s.layers * s.width + 4 * s.model.vocabulary))
        for s in setups
    )
    if free < largest:
        raise S3Error(
            f"a run needs about {largest / 2**30:.1f} GiB, and each of {workers} workers may have {free / 2**30:.1f} "
            "of the GPU's free memory: end what else is on it, or give fewer --workers"
        )
    return min(MOST_MEMBERS, int(free / largest))


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
        S3Error: the folder is in use or of another experiment, the text or the device is not here, an optimizer refuses
            a setting, or ``workers`` are more than the CPU has cores.
    """
    if device == "cpu" and workers > machine.cores():
        raise S3Error(
            f"--workers is {workers}: each trains on a core of its own, and this process may use {machine.cores()}"
        )
    deadline = time.monotonic() + 60 * minutes
    settings.check(experiment)
    plan = Plan(experiment, text.load(experiment.text, experiment.vocabulary).sha256)
    members = members_that_fit(experiment.setups.values(), device, workers)
    kept = folder / unfinished.FOLDER
    with (
        Workers(workers, (experiment.text, experiment.vocabulary), device, deadline, kept) as pool,
        _stopped_in_order(console),
    ):
        if dry_run:
            console.print(budget(plan, _probe(plan, pool, members, deadline), workers))
            return False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock", timeout=0):
                cells = CellsFile(folder / "cells.jsonl", experiment, plan.text)
                if plan.ready(cells.results):
                    costs = _probe(plan, pool, members, deadline)
                    console.print(budget(plan, costs, workers))
                    _run(plan, pool, cells, costs, deadline, console)
                is_whole = not plan.ready(cells.results)
                if is_whole:  # what is left there was begun by other code
                    shutil.rmtree(kept, ignore_errors=True)
                return is_whole
        except Timeout:
            raise S3Error(f"another comparison writes into {folder}: wait for it, or give another by --out") from None
        except OSError as error:
            raise S3Error(f"{folder} cannot be written: {error.strerror or error}") from None


@contextmanager
def _stopped_in_order(console: Console) -> Iterator[None]:
    """Make exceptions of a cluster's SIGTERM and a lost terminal's SIGHUP, as Ctrl-C is one."""
    numbers = [n for n in ENDINGS if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print_line(console, "stopping: what is trained is kept, and the same command goes on")
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _probe(plan: Plan, pool: Workers, members: int, deadline: float) -> Costs:
    """Time the first steps of each kind of stack, on all workers at once as later: with one member, and with many."""
    counts: Counter[tuple[str, str]] = Counter()
    single: dict[tuple[str, str], Cell] = {}
    for name, setup in plan.pairs():
        entry = plan.experiment.contenders[name]
        cell = plan.cell(name, setup, (entry.rates[0], dumps(entry.settings)), plan.experiment.seeds[0])
        single.setdefault(kind(cell), cell)
        counts[kind(cell)] += plan.runs(name)
    todo = [[cell] for cell in single.values()]
    for its, cell in single.items():
        if (most := min(members, counts[its])) > 1 and CONTENDERS[cell.optimizer].stacked:
            todo.append([cell] * most)
    costs = Costs(members)
    while pool.cells or (todo and time.monotonic() < deadline):
        while todo and pool.free and time.monotonic() < deadline:
            pool.probe(todo.pop(0))
        for cells, seconds in pool.finished(1.0):
            if seconds is not None:
                costs.add(cells, seconds)
    return costs


def budget(plan: Plan, costs: Costs, workers: int) -> Table:
    """Lay out what the whole experiment takes here."""
    table = Table(title=escape(f"{plan.experiment.name}: {plan.experiment.title}"), title_justify="left", box=None)
    for heading in ("setup", "cells", "operations", "ms a step", "minutes here"):
        table.add_column(heading, justify="left" if heading == "setup" else "right", overflow="fold")
    for name, count in plan.total().items():
        setup = plan.experiment.setups[name]
        kinds = {its: max(by) for its, by in costs.seconds.items() if its[0] == name}
        if not kinds:  # the time was over before
            table.add_row(escape(name), str(count), *["-"] * 3)
            continue
        mean = fmean(costs.step(its, size) / size for its, size in kinds.items())  # of a run in a full stack
        operations = count * setup.model.operations(setup.steps * setup.batch * setup.length)
        minutes = count * setup.steps * mean / workers / 60
        table.add_row(escape(name), str(count), f"{operations:.1e}", f"{1e3 * mean:.1f}", f"{minutes:.1f}")
    return table


def _run(plan: Plan, pool: Workers, file: CellsFile, costs: Costs, deadline: float, console: Console) -> None:
    """Train stacks until none is left, or the time is over: first those that end in it, in order of value."""
    setups = plan.experiment.setups
    totals = plan.total()
    count, steps = sum(totals.values()), sum(count * setups[name].steps for name, count in totals.items())
    ready = plan.ready(file.results)

    def ends_late(stack: Sequence[Cell]) -> bool:
        return time.monotonic() + SLACK * costs.of(stack) >= deadline

    with share_line(console, plan.experiment.name, steps) as line:
        while True:
            taken = {cell.key for cell in pool.cells}
            for stack in sorted(
                stacks([cell for cell in ready if cell.key not in taken], costs.members), key=ends_late
            ):
                if pool.free and time.monotonic() < deadline:
                    pool.train(stack)
            if not pool.cells:
                return
            for cells, results in pool.finished(1.0):
                if results is None:
                    continue
                file.add(results)
                file_of(file.path.parent / unfinished.FOLDER, cells).unlink(missing_ok=True)
                costs.add(cells, results[0]["seconds"] * len(cells) / cells[0].setup.steps)
                ready = plan.ready(file.results)
            done = sum(setups[result["setup"]].steps for result in file.results.values())
            names = list(dict.fromkeys(cell.contender for cell in pool.cells))
            now = f", training {', '.join(names[:MOST_NAMES])}" if names else ""
            line.advance(done + pool.steps, f"{len(file.results)} of {count} runs{now}")
