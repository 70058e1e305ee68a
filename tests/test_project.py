"""The project's own files: the interpreter finder, the Makefile, the pinned versions, what starts without torch."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FINDER = ROOT / "launch/find-python.sh"
PYTHON = getattr(sys, "_base_executable", sys.executable)

# What an interpreter looks like to the finder: the real one, with one thing made wrong before the finder's code runs.
OLD = "sys.version_info = (3, 11, 7, 'final', 0)"
NEW = "sys.version_info = (3, 14, 0, 'final', 0)"
WITHOUT_ENSUREPIP = "sys.modules['ensurepip'] = None"
WITHOUT_HEADERS = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'"
INTEL_MAC = "import os; sys.platform = 'darwin'; os.uname = lambda: os.uname_result([''] * 4 + ['x86_64'])"
SHIM = "sys.exit('pyenv: python3.12: command not found')"


def fake(path: Path, wrong: str = "pass") -> Path:
    """An executable at ``path`` that runs ``-I -c CODE`` as this Python after the statement ``wrong``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{PYTHON}" -I -c "import sys; {wrong}; exec(sys.argv[1])" "$3"\n')
    path.chmod(0o755)
    return path


def find(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the finder where nothing but ``tmp_path`` can hold a Python."""
    clean = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), **env}
    return subprocess.run(["/bin/sh", str(FINDER)], env=clean, capture_output=True, text=True, timeout=250)


def test_finder_passes_over_a_shim_that_exists_and_fails(tmp_path: Path):
    """pyenv puts a python3.12 on the PATH that only says "command not found"; ``which`` would have taken it."""
    fake(tmp_path / "bin/python3.12", SHIM)
    fake(tmp_path / "bin/python3.13", OLD)
    fake(tmp_path / "bin/python3")
    found = find(tmp_path)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, PYTHON, "")


@pytest.mark.parametrize("wrong", [OLD, NEW, WITHOUT_ENSUREPIP, WITHOUT_HEADERS, INTEL_MAC, SHIM])
def test_finder_refuses_what_cannot_carry_the_project(tmp_path: Path, wrong: str):
    fake(tmp_path / "bin/python3", wrong)
    found = find(tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert len(found.stderr.splitlines()) == 1
    assert "uv python install 3.12" in found.stderr


def test_finder_looks_into_pyenv_and_uv(tmp_path: Path):
    fake(tmp_path / "home/.pyenv/versions/3.12.1/bin/python")
    assert find(tmp_path).stdout.strip() == PYTHON
    fake(tmp_path / "elsewhere/versions/3.13.0/bin/python")
    assert find(tmp_path, HOME="/nowhere", PYENV_ROOT=str(tmp_path / "elsewhere")).stdout.strip() == PYTHON

    uv = tmp_path / "bin/uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\n[ "$*" = "python find --python-preference only-managed 3.13" ] && echo "{PYTHON}"\n')
    uv.chmod(0o755)
    assert find(tmp_path, HOME="/nowhere").stdout.strip() == PYTHON


def test_finder_takes_the_named_one_and_no_other(tmp_path: Path):
    fake(tmp_path / "bin/python3")
    named = fake(tmp_path / "named")
    assert find(tmp_path, PYTHON=str(named)).stdout.strip() == PYTHON
    old = fake(tmp_path / "old", OLD)
    for value, reason in ((str(old), "it is 3.11.7 and not 3.12 or 3.13"), ("/nowhere", "it does not run")):
        refused = find(tmp_path, PYTHON=value)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"PYTHON={value} will not do: {reason}; " in refused.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The Makefile with an interpreter that only notes what it is asked; pip fails while a file BROKEN is there."""
    (tmp_path / "launch").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    finder = tmp_path / "launch/find-python.sh"
    finder.write_text("#!/bin/sh\necho ./python\n")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >>calls\n'
        'case "$2" in\nvenv) mkdir -p "$3/bin" && cp python "$3/bin/python" ;;\npip) [ ! -e BROKEN ] ;;\nesac\n'
    )
    for script in (finder, python):
        script.chmod(0o755)
    return tmp_path


def start(tree: Path) -> subprocess.Popen[str]:
    """Start ``make venv``."""
    # An outer make would hand its flags and its PYTHON down.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    pipe = subprocess.PIPE
    return subprocess.Popen(["make", "venv"], cwd=tree, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def build(tree: Path) -> tuple[int, list[str]]:
    """Run ``make venv``; returns its status and what the interpreters were asked to do: venv, pip."""
    (tree / "calls").unlink(missing_ok=True)
    make = start(tree)
    make.communicate(timeout=250)
    return make.returncode, calls(tree)


def calls(tree: Path) -> list[str]:
    file = tree / "calls"
    return re.findall(r"^-m (venv|pip)", file.read_text(), re.MULTILINE) if file.exists() else []


def test_make_reuses_a_complete_environment(tree: Path):
    assert build(tree) == (0, ["venv", "pip", "pip"])
    assert build(tree) == (0, [])
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        os.utime(tree / name, (2**31, 2**31))
        assert build(tree) == (0, ["pip", "pip"]), "brought up to date in place"
        os.utime(tree / name, (0, 0))


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is util-linux's: macOS has none")
def test_of_two_makes_one_builds_the_environment(tree: Path):
    """``make demo`` and ``make test`` in two terminals of a fresh clone: each began with rm -rf .venv."""
    python = tree / "python"
    python.write_text(python.read_text().replace("[ ! -e BROKEN ]", "sleep 0.5"))
    makes = [start(tree) for _ in range(2)]
    printed = [make.communicate(timeout=250)[0] for make in makes]
    assert [make.returncode for make in makes] == [0, 0], printed
    assert calls(tree) == ["venv", "pip", "pip"]
    assert sum("another make is building .venv: waiting for it" in text for text in printed) == 1
    assert build(tree) == (0, [])


def test_an_interrupted_install_does_not_look_complete(tree: Path):
    (tree / "BROKEN").touch()
    status, calls = build(tree)
    assert status != 0 and calls == ["venv", "pip"]
    (tree / ".venv/half-installed").touch()
    (tree / "BROKEN").unlink()
    assert build(tree) == (0, ["venv", "pip", "pip"])
    assert not (tree / ".venv/half-installed").exists()


def test_an_interrupted_update_does_not_look_complete(tree: Path):
    build(tree)
    os.utime(tree / "constraints.txt", (2**31, 2**31))
    (tree / "BROKEN").touch()
    assert build(tree)[0] != 0
    (tree / "BROKEN").unlink()
    assert build(tree) == (0, ["venv", "pip", "pip"])


def test_everything_that_make_installs_has_an_exact_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"--editable '\.\[(.*)\]'", (ROOT / "Makefile").read_text())
    assert extras is not None
    declared = [*project["dependencies"]]
    for extra in extras[1].split(","):
        declared += project["optional-dependencies"][extra]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {normalized(line.partition("==")[0]) for line in lines}
    assert [name for name in declared if normalized(re.match(r"[\w.-]+", name)[0]) not in pinned] == []


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_a_person_types_starts_without_torch():
    """Login nodes have no torch, and its import takes seconds that ``--help`` should not cost."""
    code = "import sys, s3_megatron.cli, s3_megatron.demo.__main__, s3_megatron.jobs.checks; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=250, check=True, capture_output=True, text=True
    )
    assert not {"torch", "megatron"} & set(loaded.stdout.split())


def make(tree: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run make where an environment is complete, whose python only says what it is asked."""
    python = tree / ".venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\nfor word; do printf "<%s>" "$word"; done\n')
    python.chmod(0o755)
    os.utime(tree / "setup.py", (0, 0))
    (tree / ".venv/.complete").touch()
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ENGINE", "OPTIMIZER"))
    }
    return subprocess.run(["make", *arguments], cwd=tree, env={**clean, **env}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "env", "asked"),
    [
        ([], {}, ""),
        (["ENGINE="], {}, ""),
        (["ENGINE=deepspeed"], {}, "<--engine><deepspeed>"),
        ([], {"ENGINE": "deepspeed"}, "<--engine><deepspeed>"),
        (["ENGINE=a 'b c; echo x=y"], {}, "<--engine><a 'b c; echo x=y>"),
        (["OPTIMIZER=a b", "ENGINE=c"], {}, "<--engine><c><--optimizer><a b>"),
    ],
)
def test_make_demo_hands_its_variables_on_as_they_are(
    tree: Path, arguments: list[str], env: dict[str, str], asked: str
):
    """Two words were two arguments, and a quote broke the shell's line."""
    assert make(tree, "demo", *arguments, **env).stdout == f"<-m><s3_megatron.demo>{asked}"


def test_make_demo_refuses_a_variable_it_does_not_have(tree: Path):
    """``make demo ENGIN=deepspeed`` trained with Megatron for minutes."""
    refused = make(tree, "demo", "ENGIN=deepspeed", "VENV=.venv")
    assert refused.returncode == 2 and refused.stdout == ""
    assert "make demo has no variable ENGIN: there are ENGINE (megatron or deepspeed), OPTIMIZER (" in refused.stderr


def test_make_help_lists_the_targets_in_columns(tree: Path):
    """BSD's sed, which macOS has, wrote a t for a tabulator."""
    lines = make(tree, "help").stdout.splitlines()
    assert any(line.startswith("  make demo ") for line in lines)
    assert len({len(line) - len(line[10:].split(" ", 1)[1].lstrip()) for line in lines}) <= 2


def test_every_text_file_is_read_and_written_as_utf8() -> None:
    """ruff's PLW1514 sees an open() where it knows the type, which is one in ten. A locale's own encoding made a recipe
    with an umlaut another one on each machine."""
    without = []
    for path in (ROOT / "s3_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and _is_text(node)
                and not any(one.arg == "encoding" for one in node.keywords)
            ):
                without.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not without


def _is_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if name == "open":
        words = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        return any(re.fullmatch("[rwax]t?[+]?", word) for word in words)
    return any(one.arg in ("text", "universal_newlines") for one in call.keywords)


def test_the_page_on_the_architecture_lists_the_rooms_that_the_linter_holds():
    """In the linter's order: a room that moves, comes or goes is moved, described or taken out there too."""
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    page = (ROOT / "docs/architecture.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [layer.strip("()") for layer in layers]


def test_the_pages_name_files_that_exist():
    """A page that names a file is read by people who then open it. HOST and VERSION stand for any."""
    named = {
        (page.name, path)
        for page in (ROOT / "docs").glob("*.md")
        for path in re.findall(
            r"`((?:s3_megatron|tests|configs|launch|patches|benchmarks)/[\w./-]+)`", page.read_text()
        )
    }
    assert len(named) > 20  # or the pattern finds nothing, and the test cannot fail
    there = {found for found in named if (ROOT / found[1]).exists() or re.search("HOST|VERSION", found[1])}
    assert sorted(named - there) == []


def test_the_walks_on_the_architectures_page_go_through_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text().split("## Four walks")[1]
    walked = re.findall(r"`(\w+/[\w/]+\.py)`", page)
    assert len(walked) > 20
    assert [path for path in walked if not (ROOT / "s3_megatron" / path).exists()] == []
