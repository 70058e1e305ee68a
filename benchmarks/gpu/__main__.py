"""Prove the kernel and both engines on this machine's GPU: ``make gpu``, or here ``python -m benchmarks.gpu``.

Ends before --minutes, whatever hangs. OUT then has gpu.json, every figure, and logs.tgz; the table is printed last.
Exit code 1 if a step failed, ran over its limit or was skipped.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import report, wheels
from benchmarks.gpu.runner import PASSED, Outcome, Step, run
from benchmarks.gpu.steps import ROOT, steps
from s3_megatron.files import write_file

_TABLE_SECONDS = 10.0  # for the table and the archive


def main() -> None:
    """Run every step that can run here."""
    started = time.monotonic()
    args = _arguments()
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * args.minutes - _TABLE_SECONDS
    console = Console(width=140)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="s3-gpu-") as name:
        folder = Path(name)
        site = folder / "site"
        complaint = None if args.dry else wheels.install(wheels.FOLDER, site)
        missing = wheels.obstacles() if complaint is None else dict.fromkeys(wheels.CARRIED.values(), complaint)
        environment = _environment(folder, site, args.dry)
        card = {"obstacle": None} if args.dry else _card(environment)

        def obstacle(step: Step) -> str | None:
            return _obstacle(step, card, missing)

        outcomes: list[Outcome] = []
        found: dict[str, Any] = {}

        def say(outcome: Outcome) -> None:
            """Show and write what there is: a machine may be taken back in the middle."""
            outcomes.append(outcome)
            found.update(report.figures(outcomes, folder, card, command))
            write_file(out / "gpu.json", (json.dumps(found, indent=1) + "\n").encode())
            report.archive(folder, out / "logs.tgz")
            line = f"{time.monotonic() - started:4.0f} s  {outcome.step.name}: {outcome.state} {outcome.reason}"
            _show(console, line)

        run(steps(folder, args.dry), folder, environment, deadline, obstacle, say)
    _show(console, report.table(found))
    _show(console, f"{time.monotonic() - started:.0f} s; figures and logs are in {out}")
    sys.exit(any(outcome.state != PASSED for outcome in outcomes))


def _show(console: Console, what: str | Table) -> None:
    """Print; a reader that is gone, as in ``make gpu | head``, must not cost the figures."""
    with contextlib.suppress(OSError):
        console.print(what, markup=False, highlight=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="the whole ends before (default: 6)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="a folder (default: runs/gpu)")
    parser.add_argument("--dry", action="store_true", help="every step on the CPU, tiny: a rehearsal of the visit")
    args = parser.parse_args()
    if not args.minutes > 0.5:
        parser.error(f"--minutes {args.minutes:g} leaves no time for a step: give more than 0.5")
    return args


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


def _card(environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.card"]
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return {"obstacle": "the driver does not answer in 60 s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"obstacle": f"torch does not start: {''.join(last)}"}
    card: dict[str, Any] = json.loads(lines[-1])
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


if __name__ == "__main__":
    main()
