"""Reading the Dockerfile as Docker would: its targets, what they copy, what pip is asked for."""

import re
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Every instruction of the file and its text, continued lines joined."""
    return [(step["instruction"], step["value"]) for step in DockerfileParser(str(ROOT / "Dockerfile")).structure]


def target(name: str) -> list[tuple[str, str]]:
    """The instructions of one build target, from its FROM on."""
    mine: list[tuple[str, str]] = []
    for instruction, value in instructions():
        if instruction == "FROM" and mine:
            break
        if mine or (instruction == "FROM" and value.endswith(f" AS {name}")):
            mine.append((instruction, value))
    assert mine, f"no target {name}"
    return mine


def pip_installs(name: str) -> list[list[str]]:
    """What stands behind every ``pip install`` of a target, as the shell would hand it to pip."""
    found: list[list[str]] = []
    for instruction, value in target(name):
        if instruction == "RUN":
            words = shlex.shlex(value, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            commands: list[list[str]] = [[]]
            for word in words:
                if set(word) <= set("&|;(){}"):
                    commands.append([])
                else:
                    commands[-1].append(word)
            found += [command[2:] for command in commands if command[:2] == ["pip", "install"]]
    assert sum(text.count("pip install") for _, text in target(name)) == len(found), "an install hides from this test"
    return found


def copy_context(name: str, folder: Path) -> None:
    """Copy to ``folder``, which is the target's working folder, what its COPY instructions get past .dockerignore."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for instruction, value in target(name):
        if instruction != "COPY":
            continue
        *sources, destination = value.split()
        for source in sources:
            origin = ROOT / source
            # A link stays a link, as it does for Docker.
            files = [path for path in (origin, *origin.rglob("*")) if path.is_symlink() or path.is_file()]
            kept = [path for path in files if _let_through(path.relative_to(ROOT), rules)]
            assert kept, f"COPY {source}: nothing there that .dockerignore lets through"
            for path in kept:
                # "./" takes the file under its own name; any other destination is the copy's name.
                end = folder / destination / (path.name if destination == "./" else path.relative_to(origin))
                end.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, end, follow_symlinks=False)


def _let_through(path: Path, rules: list[str]) -> bool:
    """Whether .dockerignore leaves a file in: the last rule that fits it, or a folder above it, decides."""
    names = [str(path), *map(str, path.parents)][:-1]
    kept = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        # "**/" also stands for no folder at all, and "*" of Docker ends at a "/".
        fits = (
            any(fnmatch(Path(name).name, pattern.removeprefix("**/")) for name in names)
            if pattern.startswith("**/")
            else any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for name in names)
        )
        if fits:
            kept = rule.startswith("!")
    return kept


def pins(text: str) -> dict[str, str]:
    """The versions in a constraints file, by normalized name."""
    lines = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {normalized(name): version.strip() for name, version in lines}


def normalized(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
