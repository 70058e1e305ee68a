"""Runs torch's own optimizer tests with S3 beside AdamW, from a checkout of pytorch (``make test-peers TORCH=...``).

``python -m tests.peers.run [--check] CHECKOUT``: with --check it looks at the checkout alone. Ends with 0 if every
outcome is written down (tests/peers/VERSION.txt), 1 if not, 2 if the checkout cannot be used. It stays as it is.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from tests import junit
from tests.peers import expected
from tests.peers.expected import Outcome
from tests.peers.suites import SUITES, Suite, copy_tests

ROOT = Path(__file__).resolve().parents[2]


class Unusable(Exception):
    """The checkout cannot be used; the message is one line."""


def version_of(checkout: str) -> str:
    """The version of torch whose tests lie in ``checkout``.

    Raises:
        Unusable: no path, none of torch's, files missing, or a version without a list.
    """
    if not checkout:
        raise Unusable("TORCH is not set: make test-peers TORCH=PATH, a source tree of pytorch with its test/ folder")
    root = Path(checkout).expanduser()
    if not root.is_dir():
        raise Unusable(f"TORCH is {checkout}: there is no such folder; give a source tree of pytorch")
    missing = [
        name for name in ("version.txt", *(f"test/{suite.file}" for suite in SUITES)) if not (root / name).is_file()
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Unusable(f"TORCH is {checkout}: {missing[0]}{more} not there; give a whole source tree of pytorch")
    found = re.match(r"[\d.]*\d", (root / "version.txt").read_text(encoding="utf-8", errors="replace"))
    known = expected.versions()
    if found is None or found[0] not in known:
        shown = found[0] if found else "no version"
        raise Unusable(
            f"TORCH is {checkout}: version.txt has {shown}; outcomes are written down for {', '.join(known)}"
        )
    return found[0]


def outcomes(report: Path) -> dict[str, str]:
    """What became of every test: "passed", "failed", or "skipped"."""
    return {f"{where.rpartition('.')[2]}::{name}": became for where, name, became in junit.outcomes(report)}


def run(suite: Suite, tests: Path, options: list[str]) -> dict[str, str]:
    """Run a file of torch's tests in the copy ``tests``."""
    report = tests / "report.xml"
    report.unlink(missing_ok=True)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(tests))),
        "CUDA_VISIBLE_DEVICES": "",  # the list is of outcomes on a CPU
        "PYTORCH_PRINT_REPRO_ON_FAILURE": "0",
        "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": "180",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.peers.plugin", "-p", "no:cacheprovider"]
    command += ["--noconftest", "-c", os.devnull, "--rootdir", str(tests), "--timeout=200", "--tb=short"]
    command += [f"--junitxml={report}", *options, suite.file]
    done = subprocess.run(command, cwd=tests, env=env, check=False, capture_output=True, text=True, errors="replace")
    (tests / f"{suite.file.replace('/', '.')}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if not report.exists():
        sys.exit(f"pytest wrote no report for {suite.file}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return outcomes(report)


def both(suite: Suite, tests: Path) -> dict[str, Outcome]:
    """Run a file with S3 and with AdamW; the tests' names have ROW where the table's row stood."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row, options in suite.rows.items():
        for name, became in run(suite, tests, options).items():
            if suite.has_rows:
                row = "S3" if "_S3_" in name else "AdamW"
                name = name.replace(f"_{row}_", "_ROW_")
            found[f"{suite.file}::{name}"][row] = became
    return {name: Outcome(rows.get("S3", "absent"), rows.get("AdamW", "absent")) for name, rows in found.items()}


def main(arguments: list[str]) -> int:
    """Run every file, or with --check none; see the module for the exit codes."""
    *options, checkout = arguments or [""]
    try:
        of = version_of(checkout)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    if options == ["--check"]:
        return 0
    print(f"torch's tests of {of}, on torch {version('torch')}: S3, with AdamW as control", flush=True)
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="test-peers-") as folder:
        copy_tests(Path(checkout).expanduser(), Path(folder))
        for suite in SUITES:
            these = both(suite, Path(folder))
            found |= these
            kinds = [
                f"{sum(o == kind for o in these.values())} S3 {kind.s3}, AdamW {kind.adamw}"
                for kind in sorted(set(these.values()))
            ]
            print(f"{suite.file}: {'; '.join(kinds)}", flush=True)
    lines = expected.differences(found, expected.read(of))
    print("\n".join([*lines, f"{len(found)} tests, {len(lines)} not as written down in tests/peers/{of}.txt"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
