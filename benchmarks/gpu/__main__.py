"""Prove the kernel and both engines on this machine's GPU: ``make gpu``, or here ``python -m benchmarks.gpu``.

Ends before --minutes, whatever hangs. OUT then has gpu.json, every figure, and logs.tgz; the table is printed last.
Exit code 1 if a step failed, ran over its limit or was skipped, 2 on a mistake.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import wheels
from s3_megatron import machine
from s3_megatron.errors import S3Error

_LEAST_MINUTES = 0.5


def main() -> None:
    """Unpack what this Python lacks, and run every step that can run here. Needs nothing but Python until then."""
    machine.use_utf8()
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # leaves by way of what ends the steps
    args = _arguments()
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    folder = Path(tempfile.mkdtemp(prefix="s3-gpu-"))
    try:
        passed = _visit(args, folder, started, command)
    except S3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        # Thousands of files, 15 s on a slow disk: they are removed in the background.
        subprocess.Popen(
            ["rm", "-rf", str(folder)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    sys.exit(not passed)


def _visit(args: argparse.Namespace, folder: Path, started: float, command: str) -> bool:
    missing = wheels.install(wheels.FOLDER, folder / "site", limit=min(60.0, 30 * args.minutes))
    sys.path.insert(0, str(folder / "site"))
    if absent := [missing[module] for module in wheels.OWN if module in missing]:
        raise S3Error(absent[0])
    from benchmarks.gpu import visit

    return visit.run(args, folder, missing, started, command)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="the whole ends before (default: 6)")
    parser.add_argument(
        "--out", type=Path, default=wheels.ROOT / "runs/gpu", help="a folder for results (default: runs/gpu)"
    )
    parser.add_argument("--dry", action="store_true", help="every step on the CPU, tiny: a rehearsal of the visit")
    args = parser.parse_args()
    if not args.minutes > _LEAST_MINUTES:  # NaN is not, either
        parser.error(f"--minutes {args.minutes:g} leaves no time for a step: give more than {_LEAST_MINUTES}")
    return args


if __name__ == "__main__":
    main()
