"""Finding a host, and its version, in a folder, without running any of it."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.patch.edit import parse

# What shows that a folder holds the host.
_MARKERS = {"megatron-lm": "megatron/core/package_info.py", "deepspeed": "deepspeed/__init__.py"}
HOSTS = tuple(_MARKERS)


@dataclass(frozen=True)
class Place:
    """A checkout or site-packages folder, ``root``, and the host in it."""

    root: Path
    host: str
    version: str


def find(path: Path, host: str | None = None) -> Place:
    """Find the host in ``path``: a checkout, a site-packages folder, or a package folder in one of these.

    Raises:
        S3Error: there is none, there are both and ``host`` does not say which, or its version cannot be read.
    """
    if host is not None and host not in HOSTS:
        raise S3Error(f"--host is {host}: it must be {' or '.join(HOSTS)}")
    if not path.is_dir():
        raise S3Error(f"{path} is no folder: name a checkout of Megatron-LM or DeepSpeed, or a site-packages folder")
    here = path.resolve()
    for root in (here, *here.parents[:2]):  # megatron/core is two below
        found = [name for name, marker in _MARKERS.items() if (root / marker).is_file() and host in (None, name)]
        if root != here:
            found = [name for name in found if here.is_relative_to(root / _MARKERS[name].split("/")[0])]
        if len(found) > 1:
            raise S3Error(f"{root} holds both Megatron and DeepSpeed: pass --host megatron-lm or --host deepspeed")
        if found:
            return Place(root, found[0], _version(root, found[0]))
    wanted = {name: marker for name, marker in _MARKERS.items() if host in (None, name)}
    raise S3Error(f"{path} holds no {' or '.join(wanted)}: name the folder in which {' or '.join(wanted.values())} is")


def _version(root: Path, host: str) -> str:
    """Read a version as ``Megatron-core`` 0.19.2 and DeepSpeed 0.19.8 write it; a local part, ``+abc``, is left out."""
    if host == "megatron-lm":
        source = root / _MARKERS[host]
        names = _constants(source)
        parts = [names.get(name) for name in ("MAJOR", "MINOR", "PATCH")]
        version = ".".join(map(str, parts)) + str(names.get("PRE_RELEASE", ""))
    elif (root / "setup.py").exists():
        source = root / "version.txt"
        version = source.read_text(encoding="utf-8").strip() if source.exists() else ""
    else:
        source = root / "deepspeed/git_version_info_installed.py"
        version = str(_constants(source).get("version", "")).strip()
    version = version.partition("+")[0]
    if not re.match(r"\d+\.\d+\.\d+", version):
        raise S3Error(f"{source} does not say which version of {host} this is: restore the release's file")
    return version


def _constants(source: Path) -> dict[str, Any]:
    """Read the constants that a module sets; those of a missing or broken one are none."""
    try:
        body = parse(source.read_bytes()).body
    except (OSError, SyntaxError):
        return {}
    return {
        target.id: statement.value.value
        for statement in body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
