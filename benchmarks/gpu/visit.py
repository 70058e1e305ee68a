"""A visit to a GPU: what it finds there, its steps, and what it writes."""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import report, runner
from benchmarks.gpu.runner import PASSED, Outcome, Step
from benchmarks.gpu.steps import ROOT, steps
from s3_megatron.files import write_file

_TABLE_SECONDS = 10.0  # for the table and the archive
_CARD_SECONDS = 60.0


def run(args: argparse.Namespace, folder: Path, missing: dict[str, str], started: float, command: str) -> bool:
    """Run every step that can run here, and print the table; returns whether all passed.

    ``missing`` has the modules that are not here, and why; ``started`` is when the visit began, of time.monotonic.

    Raises:
        S3Error: the folder for results cannot be written.
    """
    out: Path = args.out.resolve()
    report.archive(folder, out / "logs.tgz")  # an empty one, before a minute is spent: it may not be possible
    deadline = started + 60 * args.minutes - _TABLE_SECONDS
    console = Console(width=140)
    environment = _environment(folder, folder / "site", args.dry)
    card = {"obstacle": None} if args.dry else _card(folder, environment, deadline)
    outcomes: list[Outcome] = []
    found: dict[str, Any] = {}

    def show(ended: list[Outcome]) -> None:
        """Show and write what there is: a machine may be taken back in the middle."""
        outcomes.extend(ended)
        found.update(report.figures(outcomes, folder, card, command))
        write_file(out / "gpu.json", (json.dumps(found, indent=1) + "\n").encode())
        report.archive(folder, out / "logs.tgz")
        for outcome in ended:
            line = f"{time.monotonic() - started:4.0f} s  {outcome.step.name}: {outcome.state} {outcome.reason}"
            _show(console, line)

    planned, free = steps(folder, args.dry), card.get("free_gib", math.inf)
    runner.run(planned, folder, environment, deadline, lambda step: _obstacle(step, card, missing), show, free)
    _show(console, report.table(found))
    _show(console, f"{time.monotonic() - started:.0f} s; figures and logs are in {out}")
    return all(outcome.state == PASSED for outcome in outcomes)


def _show(console: Console, what: str | Table) -> None:
    """Print; a reader that is gone, as in ``make gpu | head``, must not cost the figures."""
    with contextlib.suppress(OSError):
        console.print(what, markup=False, highlight=False)


def _environment(folder: Path, site: Path, dry: bool) -> dict[str, str]:
    """What steps find: this tree, the carried wheels, caches of their own, and no network."""
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    ours |= {"COLUMNS": "140", "OMP_NUM_THREADS": "1" if dry else "4", "S3_GPU_VISIT": "1"}
    if dry:
        return {**os.environ, **ours, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "S3_MEGATRON_CACHE"):
        ours[name] = str(folder / name.lower())
    ours |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **ours, **_compiler()}


def _compiler() -> dict[str, str]:
    """Where nvcc finds headers that torch's own wheels bring; DeepSpeed's FusedAdam is compiled here."""
    import importlib.util

    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return {}
    nvidia = Path(torch.origin).parents[1] / "nvidia"
    return {"CPATH": os.pathsep.join(map(str, sorted(nvidia.glob("cu*/include"))))} if nvidia.is_dir() else {}


def _card(folder: Path, environment: dict[str, str], deadline: float) -> dict[str, Any]:
    """What GPU is here, and what is wrong with it: a broken driver hangs whoever asks, so a process of its own does."""
    limit = min(_CARD_SECONDS, (deadline - time.monotonic()) / 2)
    step = Step("card", 0, limit, [sys.executable, "-m", "benchmarks.gpu.card"])
    (outcome,) = runner.run([step], folder, environment, deadline, lambda _: None, lambda _: None)
    if outcome.state == runner.LATE:
        return {"obstacle": f"the driver does not answer in {outcome.seconds:.0f} s"}
    if outcome.state != PASSED:
        return {"obstacle": f"torch does not start: {outcome.reason}"}
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return card


def _obstacle(step: Step, card: dict[str, Any], missing: dict[str, str]) -> str | None:
    """Why a step cannot run here, in one line."""
    if step.gpu and card["obstacle"]:
        return str(card["obstacle"])
    if reasons := [missing[module] for module in step.modules if module in missing]:
        return reasons[0]
    if absent := [program for program in step.programs if shutil.which(program) is None]:
        return f"{absent[0]} is not on the PATH"
    if step.gpu and card["free_gib"] < step.gib:
        return f"{card['free_gib']:.0f} GiB of the GPU's memory are free, and it needs {step.gib:g}"
    return None
