"""Run the experiments of docs/evidence.md on this machine's GPU: ``make gpu-evidence``.

It needs this checkout, a Python with torch, numpy and scipy, and, for the rest, .whl/ (``make gpu-wheels``) and
.text.tar (``make gpu-text``). It ends before --minutes. OUT then has two files to bring home: evidence.tgz, with a
folder an experiment, and evidence.md, which says how far each came. With evidence.tgz in OUT, here or on another
machine, the same command goes on.
"""

import argparse
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import wheels

if TYPE_CHECKING:
    from s3_megatron.evidence.experiments import Experiment

# By worth: the question itself, what makes the difference, rates and spikes, and what takes longest.
ORDER = ("table2", "table4", "rates", "spike", "horizon", "formats", "ladder")
# What experiments need beside torch, numpy and scipy. Without matplotlib there are no pictures: they are drawn at home.
NEEDED = {name: wheels.CARRIED[name] for name in wheels.FOR_EVIDENCE}
PACK_SECONDS, LEAST_SECONDS = 15.0, 20.0  # a busy machine took 123 s of 120 with 8
ARCHIVE, SUMMARY = "evidence.tgz", "evidence.md"


def main() -> None:
    """Run experiment after experiment until the time is over."""
    started = time.monotonic()
    args = _arguments()
    out: Path = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --out {out} cannot be made: {error.strerror}")
    deadline = started + 60 * args.minutes - PACK_SECONDS
    with tempfile.TemporaryDirectory(prefix="s3-evidence-") as name:
        _prepare(Path(name))
        _unpack(out)
        _run(out, Path(name), args, deadline)
        print(f"{time.monotonic() - started:.0f} s; bring {out / ARCHIVE} and {SUMMARY} home")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.evidence", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "experiments", nargs="*", default=ORDER, help=f"which, in this order (default: {' '.join(ORDER)})"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole ends before (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=wheels.ROOT / "runs/gpu-evidence", help="a folder (runs/gpu-evidence)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where runs train (default: cuda)")
    parser.add_argument("--workers", type=int, help="processes that train (default: 6 on a GPU, else one a core)")
    parser.add_argument("--dry", action="store_true", help="two experiments on the CPU, tiny: a rehearsal of the visit")
    args = parser.parse_args()
    if not args.minutes > 0.5:
        parser.error(f"--minutes {args.minutes:g} leaves no time for a run: give more than 0.5")
    return args


def _prepare(scratch: Path) -> None:
    """Lay carried wheels and texts out, for this process and its workers; exits with one line where one is missing."""
    site = scratch / "site"
    for package, module in NEEDED.items():
        if not wheels.is_installed(module):
            wheel = wheels.carried(package)
            if wheel is None:
                sys.exit(
                    f"error: {package} is neither installed nor, for this Python, in {wheels.FOLDER.name}/: "
                    "make gpu-wheels where there is a network"
                )
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)
    sys.path.append(str(site))  # workers start with this process' path
    from benchmarks.gpu import texts

    if texts.FILE.exists():
        os.environ["XDG_CACHE_HOME"] = str(scratch)
        texts.unpack(texts.FILE)


def _run(out: Path, scratch: Path, args: argparse.Namespace, deadline: float) -> None:
    from rich.console import Console

    from s3_megatron import machine
    from s3_megatron.errors import S3Error
    from s3_megatron.evidence import analysis, experiments, report
    from s3_megatron.evidence.compare import compare

    console = Console(width=140)
    device = "cpu" if args.dry else args.device
    workers = args.workers or (1 if args.dry else 6 if device == "cuda" else machine.cores())
    came: dict[str, str] = {}
    for name in args.experiments[:2] if args.dry else args.experiments:
        if deadline - time.monotonic() < LEAST_SECONDS:
            came[name] = "no time was left"
            continue
        if came:  # a machine may be taken back in the middle of the next one
            _pack(out, came)
        try:
            asked = experiments.load(name)
            if args.dry:
                asked = _tiny(asked, scratch)
            folder = out / asked.name
            left = (deadline - time.monotonic()) / 60
            compare(asked, folder, console, device=device, minutes=left, workers=workers)
            came[asked.name] = report.state(analysis.read(folder / "cells.jsonl", asked)[1])
            report.write(asked, folder)
        except S3Error as error:
            came[name] = f"error: {error}"
        print(": ".join(list(came.items())[-1]), flush=True)
    _pack(out, came)
    for folder in list(_folders(out)):
        shutil.rmtree(folder)
    if all(line.startswith("error") for line in came.values()):
        sys.exit(2)


def _tiny(asked: "Experiment", scratch: Path) -> "Experiment":
    """The same contenders and grids, in steps that take a moment."""
    from s3_megatron.evidence import quick, text

    os.environ["XDG_CACHE_HOME"] = str(scratch)
    quick.write_corpus(text.folder() / "quick.xz")
    small = {"steps": 3, "layers": 1, "width": 16, "heads": 2, "length": 16, "batch": 2, "validation": 64}
    setups = {name: replace(setup, **small, kick_step=min(1, setup.kick_step)) for name, setup in asked.setups.items()}
    tuning = asked.tuning and replace(asked.tuning, runs=7 * len(asked.tuning.all_seeds))
    name = f"dry-{asked.name}"  # its cells show nothing
    return replace(asked, name=name, setups=setups, tuning=tuning, text="quick", seeds=asked.seeds[:2], neighbours=0)


def _pack(out: Path, came: dict[str, str]) -> None:
    """Write both files."""
    partial = out / f"{ARCHIVE}.partial"
    try:
        with tarfile.open(partial, "w:gz") as tar:
            for folder in _folders(out):
                tar.add(folder, folder.name, filter=lambda info: None if _left_here(info.name) else info)
        partial.replace(out / ARCHIVE)
        (out / SUMMARY).write_text("".join(f"- {name}: {line}\n" for name, line in came.items()), encoding="utf-8")
    except OSError as error:
        partial.unlink(missing_ok=True)
        sys.exit(
            f"error: {out / ARCHIVE} cannot be written: {error.strerror or error}; the folders in {out} have the runs"
        )


def _left_here(name: str) -> bool:
    """Whether a file is not brought home: a stack of a hundred runs that was stopped has a gigabyte."""
    from s3_megatron.evidence import unfinished

    return name.endswith(".lock") or unfinished.FOLDER in Path(name).parts


def _folders(out: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(out.glob("*/cells.jsonl")))


def _unpack(out: Path) -> None:
    """Lay out what an earlier visit finished, but for folders that a killed one left: they are newer."""
    if not (out / ARCHIVE).exists():
        return
    here = {folder.name for folder in _folders(out)}
    try:
        with tarfile.open(out / ARCHIVE, "r:gz") as tar:
            members = [member for member in tar if member.name.split("/")[0] not in here]
            tar.extractall(out, members, filter="data")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        sys.exit(f"error: {out / ARCHIVE} cannot be read: {error}; move it away, or give another folder by --out")


if __name__ == "__main__":
    main()
