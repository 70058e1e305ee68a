"""Ask the package index whether the Dockerfile's cpu target can be installed: its own pip commands, with --dry-run.

``python -m tests.launch.resolve`` does so in a new virtual environment and takes one to two minutes. It is not part of
``make test``, which needs no network.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.launch.dockerfile import ROOT, copy_context, normalized, pins, pip_installs


def main() -> None:
    """Exit with an error where a requirement cannot be met, or is met by another version than constraints.txt names."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_context("cpu", folder / "context")
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        pip = [str(folder / "venv/bin/python"), "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
        tools, package = pip_installs("cpu")
        subprocess.run([*pip, *tools], cwd=folder / "context", check=True)
        report = folder / "report.json"
        dry = ["--dry-run", "--report", str(report)]
        subprocess.run([*pip, *dry, *package], cwd=folder / "context", check=True)
        chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    known = pins((ROOT / "constraints.txt").read_text())
    known["s3-megatron"] = next(one["version"] for one in chosen if one["name"] == "s3-megatron")
    loose = [
        f"{one['name']}=={one['version']}" for one in chosen if known.get(normalized(one["name"])) != one["version"]
    ]
    print(f"the cpu image: {len(chosen)} packages, resolved in {time.monotonic() - started:.0f} s")
    if loose:
        sys.exit(f"not pinned in constraints.txt: {', '.join(loose)}")


if __name__ == "__main__":
    main()
