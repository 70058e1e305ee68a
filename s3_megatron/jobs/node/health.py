"""Whether this node is fit for the job, before anything starts: ``python -m s3_megatron.jobs.node.health``.

Exits with 0, with 3 where the node should be excluded (and says so in RUN/attempts/ID/bad_nodes), and with 1 where
the shared storage is at fault, which no other node would cure.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from s3_megatron.files import write_file
from s3_megatron.jobs.node.checks import Check
from s3_megatron.jobs.node.gpus import check_gpus
from s3_megatron.train.nodes import BAD_NODES_EXIT_CODE, node_name, report_bad_node

_MAX_SKEW_SECONDS = 5.0
_GIB = 2**30


def main() -> int:
    """Check as ``sys.argv`` says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="s3_megatron.jobs.node.health", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True, help="the attempt's folder in RUN/attempts")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that a node must have")
    parser.add_argument("--min-free-gib", type=float, required=True, help="in --scratch and in the run folder")
    parser.add_argument("--min-free-inodes", type=int, required=True, help="in --scratch and in the run folder")
    parser.add_argument("--scratch", type=Path, required=True, help="the node's own folder for caches")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: look for no GPUs")
    args = parser.parse_args()
    checks, name = list(_checks(args)), node_name()
    for check in checks:
        print(f"health: {name}  {check.name:<14} {check.state:<12} {check.text}", flush=True)
    wrong = [check for check in checks if check.state == "bad"]
    attempt = args.run_dir / "attempts" / args.attempt
    try:
        if wrong:
            report_bad_node(attempt, name, "; ".join(f"{check.name}: {check.text}" for check in wrong))
        write_file(attempt / f"{name}.health.json", json.dumps([asdict(check) for check in checks], indent=2).encode())
    except (OSError, ValueError) as error:  # the table above says it, too: the run folder cannot be written
        print(f"health: {name}  cannot leave its findings in {attempt}: {error}", file=sys.stderr)
    if wrong:
        return BAD_NODES_EXIT_CODE
    return int(any(check.state == "shared" for check in checks))


def _checks(args: argparse.Namespace) -> Iterator[Check]:
    if args.cpu:
        yield Check.unknown("gpus", "a rehearsal on CPUs")
    else:
        yield from check_gpus(args.gpus)
    yield from _check_space("scratch", args.scratch, args.min_free_gib, args.min_free_inodes, Check.bad)
    # Full for one is full for all: excluding nodes would only use them up.
    yield from _check_space("run folder", args.run_dir, args.min_free_gib, args.min_free_inodes, Check.shared)
    yield from _check_run_folder(args.run_dir)


def _check_space(
    what: str, folder: Path, min_gib: float, min_inodes: int, short: Callable[[str, str], Check]
) -> Iterator[Check]:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        system = os.statvfs(existing)
    except OSError as error:
        yield Check.bad(what, f"{existing} cannot be read: {error.strerror}")
        return
    gib = system.f_bavail * system.f_frsize / _GIB
    text = f"{gib:.1f} GiB free in {existing}, {min_gib:g} wanted"
    yield Check.good(what, text) if gib >= min_gib else short(what, text)
    if system.f_files == 0:  # Btrfs and others have no fixed number
        yield Check.unknown(f"{what} inodes", f"the file system of {existing} does not count them")
        return
    text = f"{system.f_favail} inodes free in {existing}, {min_inodes} wanted"
    yield Check.good(f"{what} inodes", text) if system.f_favail >= min_inodes else short(f"{what} inodes", text)


def _check_run_folder(run: Path) -> Iterator[Check]:
    """Write a file into the run folder, and compare its time with this node's."""
    probe = run / f".health-{node_name()}-{os.getpid()}"
    before = time.time()
    try:
        probe.write_bytes(b"x")
        stamp = probe.stat().st_mtime
        probe.unlink()
    except OSError as error:
        yield Check.bad("write", f"{run} cannot be written from here: {error.strerror}")
        return
    yield Check.good("write", f"{run} can be written")
    yield check_clock(
        stamp, (before + time.time()) / 2, file_system(run, Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    )


def check_clock(stamp: float, now: float, kind: str) -> Check:
    """Compare ``stamp``, the time of a file just written to a file system of ``kind``, with this node's ``now``.

    Only NFS servers stamp what is written with their own clock. Elsewhere (Lustre, GPFS, local disks) this node
    stamps its own files, and the comparison would find nothing; there the all-reduce compares the nodes' clocks.
    """
    if not kind.startswith("nfs"):
        return Check.unknown("clock", f"{kind} stamps files with this node's own clock")
    skew = now - stamp
    text = f"{skew:+.1f} s from the file server's, at most {_MAX_SKEW_SECONDS:g} wanted"
    return Check.good("clock", text) if abs(skew) <= _MAX_SKEW_SECONDS else Check.bad("clock", text)


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
