"""Runs the engines' tests on every pair of host versions, each in a venv of its own (``make test-hosts``).

``python -m tests.hosts.run [PAIR ...]``: a pair is a file in tests/hosts, whose lines take the place of those in
constraints.txt. The venvs stay in .hosts/. With all pairs it also writes the table in docs/versions.md.
"""

import os
import re
import subprocess
import sys
import venv
from datetime import date
from pathlib import Path
from shutil import rmtree

from tests import junit
from tests.hosts import table
from tests.launch.dockerfile import ROOT, pins

HERE = Path(__file__).parent
NEWEST = pins((ROOT / "constraints.txt").read_text())
# Not tests/optim: it knows no host, and all pairs have the torch of `make test`.
SUITES = ("tests/engines/megatron", "tests/engines/deepspeed", "tests/patch")
EXTRAS = ".[megatron,deepspeed,data,jobs,demo,softmuon,dev]"
PLACE = re.compile(r"(?<=<!-- make test-hosts -->\n).*?(?=<!-- end -->)", re.DOTALL)


def constraints(pair: str) -> dict[str, str]:
    """Name and version of every package of ``pair``."""
    return NEWEST | pins((HERE / f"{pair}.txt").read_text())


def environment(pair: str) -> Path:
    """Give the venv of ``pair``, built if it is missing, or was built of other versions or extras."""
    if constraints(pair) == NEWEST:
        return ROOT / ".venv"
    folder = ROOT / ".hosts" / pair
    wanted = f"# {EXTRAS}\n" + "".join(f"{name}=={version}\n" for name, version in constraints(pair).items())
    stamp = folder / "complete.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    print(f"building .hosts/{pair}: takes 2-5 minutes", flush=True)
    rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    (folder / "constraints.txt").write_text(wanted)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", folder / "constraints.txt"]
    subprocess.run([*pip, "setuptools"], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--editable", EXTRAS], cwd=ROOT, check=True)
    stamp.write_text(wanted)
    return folder


def extensions(pair: str) -> Path:
    """Give the folder of what DeepSpeed compiles at first use: for one torch and one Python, as it is linked with both.

    Torch's own default is keyed by Python; a folder that is named to it is taken as it is.
    """
    return ROOT / ".hosts" / f"{pair}.extensions" / f"{sys.implementation.cache_tag}-torch-{constraints(pair)['torch']}"


def run(pair: str) -> dict[str, str]:
    """Run the suites; returns what became of every test: "passed", "failed", or "skipped"."""
    python = environment(pair) / "bin" / "python"
    report = ROOT / ".hosts" / f"{pair}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    print(f"== {pair}", flush=True)
    # DeepSpeed compiles at first use, and finds what another version has compiled; a checkout of Megatron on PYTHONPATH
    # would be run in the place of the pair's.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["TORCH_EXTENSIONS_DIR"] = str(extensions(pair))
    command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *SUITES]
    subprocess.run(command, cwd=ROOT, env=env, check=False)
    if not report.exists():
        sys.exit(f"pytest wrote no report for {pair}: see above")
    return {f"{where.replace('.', '/')}::{name}": became for where, name, became in junit.outcomes(report)}


def main(asked: list[str]) -> None:
    """Run what is asked for, or all; ends with 1 if a test failed."""
    pairs = sorted(path.stem for path in HERE.glob("*.txt"))
    if unknown := sorted(set(asked) - set(pairs)):
        sys.exit(f"no such pair: {', '.join(unknown)}; there are {', '.join(pairs)}")
    columns = {pair: run(pair) for pair in asked or pairs}
    rows = table.rows(columns)
    packages = [constraints(pair) for pair in columns]
    names = [f"{p['megatron-core']}, {p['deepspeed']}, {p['torch']}" for p in packages]
    text = table.markdown(["Megatron, DeepSpeed, torch", *names], rows)
    print(f"\n{text}")
    if not asked:
        page = ROOT / "docs/versions.md"
        made = f"{text}\n`make test-hosts`, {date.today()}, 2 CPU cores, gloo.\n"
        page.write_text(PLACE.sub(lambda _: made, page.read_text()))
    sys.exit(any(outcome == "failed" for column in columns.values() for outcome in column.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
