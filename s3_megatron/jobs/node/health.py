"""Whether this node is fit for the job, before anything starts: ``python -m s3_megatron.jobs.node.health``.

Exits with 0, with 3 where the node should be excluded (and says so in RUN/attempts/ID/bad_nodes), and with 1 where
the shared storage is at fault, which no other node would cure.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from s3_megatron.files import write_file
from s3_megatron.finding import ERROR, NOT_CHECKED, OK, Finding
from s3_megatron.jobs.node import verdict
from s3_megatron.jobs.node.gpus import check_gpus
from s3_megatron.machine import node_name
from s3_megatron.run_folder import RunFolder

_GIB = 2**30
# Beside a finding's other states: an error of the shared storage, for which no node is to blame.
SHARED = "shared"


def main() -> int:
    """Check as ``sys.argv`` says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="s3_megatron.jobs.node.health", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True, help="the attempt's folder in RUN/attempts")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that a node must have")
    parser.add_argument("--min-free-gib", type=float, required=True, help="in --scratch and in the run folder")
    parser.add_argument("--min-free-inodes", type=int, required=True, help="in --scratch and in the run folder")
    # Scripts that were queued before 2026-11-28 do not pass it.
    parser.add_argument("--max-clock-skew", type=float, default=5, help="from the file server's, in seconds")
    parser.add_argument("--scratch", type=Path, required=True, help="the node's own folder for caches")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: look for no GPUs")
    args = parser.parse_args()
    checks, name = list(_checks(args)), node_name()
    for check in checks:
        print(f"health: {name}  {check.name:<14} {check.state:<12} {check.found}", flush=True)
    wrong = [check for check in checks if check.state == ERROR]
    attempt = RunFolder(args.run_dir).attempt(args.attempt)
    try:
        if wrong:
            attempt.report_bad_node(name, "; ".join(f"{check.name}: {check.found}" for check in wrong))
        write_file(attempt.health(name), json.dumps([asdict(check) for check in checks], indent=2).encode())
    except (OSError, ValueError) as error:  # the table above has it, too: the run folder cannot be written
        print(f"health: {name}  cannot leave its findings in {attempt.path}: {error}", file=sys.stderr)
    if wrong:
        return verdict.BAD_NODES
    return int(any(check.state == SHARED for check in checks))


def _checks(args: argparse.Namespace) -> Iterator[Finding]:
    if args.cpu:
        yield Finding(NOT_CHECKED, "gpus", "a rehearsal on CPUs")
    else:
        yield from check_gpus(args.gpus)
    yield from _check_space("scratch", args.scratch, args.min_free_gib, args.min_free_inodes, ERROR)
    # Full for one is full for all: excluding nodes would only use them up.
    yield from _check_space("run folder", args.run_dir, args.min_free_gib, args.min_free_inodes, SHARED)
    yield from _check_run_folder(args.run_dir, args.max_clock_skew)


def _check_space(what: str, folder: Path, min_gib: float, min_inodes: int, short: str) -> Iterator[Finding]:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        system = os.statvfs(existing)
    except OSError as error:
        yield Finding(ERROR, what, f"{existing} cannot be read: {error.strerror}")
        return
    gib = system.f_bavail * system.f_frsize / _GIB
    text = f"{gib:.1f} GiB free in {existing}, {min_gib:g} wanted"
    yield Finding(OK if gib >= min_gib else short, what, text)
    if system.f_files == 0:  # Btrfs and others have no fixed number
        yield Finding(NOT_CHECKED, f"{what} inodes", f"the file system of {existing} does not count them")
        return
    text = f"{system.f_favail} inodes free in {existing}, {min_inodes} wanted"
    yield Finding(OK if system.f_favail >= min_inodes else short, f"{what} inodes", text)


def _check_run_folder(run: Path, max_skew: float) -> Iterator[Finding]:
    """Write a file into the run folder, and compare its time with this node's."""
    probe = run / f".health-{node_name()}-{os.getpid()}"
    before = time.time()
    try:
        probe.write_bytes(b"x")
        stamp = probe.stat().st_mtime
        probe.unlink()
    except OSError as error:
        yield Finding(ERROR, "write", f"{run} cannot be written from here: {error.strerror}")
        return
    yield Finding(OK, "write", f"{run} can be written")
    kind = file_system(run, Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    yield check_clock(stamp, (before + time.time()) / 2, kind, max_skew)


def check_clock(stamp: float, now: float, kind: str, limit: float) -> Finding:
    """Compare ``stamp``, the time of a file just written to a file system of ``kind``, with this node's ``now``.

    All are in seconds; more than ``limit`` apart is an error.

    Only NFS servers stamp what is written with their own clock. Elsewhere (Lustre, GPFS, local disks) this node
    stamps its own files, and the comparison would find nothing; there the all-reduce compares the nodes' clocks.
    """
    if not kind.startswith("nfs"):
        return Finding(NOT_CHECKED, "clock", f"{kind} stamps files with this node's own clock")
    skew = now - stamp
    text = f"{skew:+.1f} s from the file server's, at most {limit:g} wanted"
    return Finding(OK if abs(skew) <= limit else ERROR, "clock", text)


def file_system(path: Path, mounts: str) -> str:
    """Look up the kind of file system that ``path`` is on in ``mounts``, the text of /proc/self/mountinfo."""
    kinds = {}
    for line in mounts.splitlines():
        mount, _, about = line.partition(" - ")
        kinds[Path(mount.split()[4].replace("\\040", " "))] = about.split()[0]  # of several on one, the last is seen
    resolved = path.resolve()
    return next((kinds[parent] for parent in (resolved, *resolved.parents) if parent in kinds), "an unknown system")


if __name__ == "__main__":
    sys.exit(main())
