"""What of a host S3 goes through, compared between versions by its syntax; nothing of the host is run."""

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3_megatron.finding import OK, WARNING, Finding
from s3_megatron.patch.edit import parse
from s3_megatron.patch.place import Place
from s3_megatron.patch.release import PATCHES, Release

SAME = "same"


def listed(host: str) -> list[str]:
    """List the dotted names of all symbols that S3 goes through in one version of ``host`` or another."""
    lines = (PATCHES / host / "symbols.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def compare(place: Place, release: Release) -> list[Finding]:
    """Compare every symbol that ``release`` has with what is in ``place``; what differs is a warning."""
    source = _Source(place.root)
    return [_compare(source, symbol, known) for symbol, known in release.symbols.items()]


def describe(place: Place) -> dict[str, dict[str, str]]:
    """Make ``Release.symbols`` of what is in ``place``; what it lacks is left out."""
    source = _Source(place.root)
    found = {symbol: source.find(symbol) for symbol in listed(place.host)}
    return {symbol: _record(definition) for symbol, definition in found.items() if definition}


def _compare(source: "_Source", symbol: str, known: dict[str, str]) -> Finding:
    definition = source.find(symbol)
    if definition is None:
        moved = source.search(symbol)
        return Finding(WARNING, symbol, f"moved to {moved}" if moved else "gone")
    now = _record(definition)
    if now["file"] != known["file"]:
        return Finding(WARNING, symbol, f"moved to {now['file']}")
    changed = [f"{part} changed" for part in ("signature", "body") if now[part] != known[part]]
    return Finding(WARNING, symbol, changed[0]) if changed else Finding(OK, symbol, SAME)


@dataclass(frozen=True)
class _Definition:
    """The statements that bind a name, below ``file``; there may be several, in branches."""

    file: str
    statements: list[ast.stmt]


def _record(definition: _Definition) -> dict[str, str]:
    signature = "".join(map(_signature, definition.statements))
    body = "".join(map(_canonical, definition.statements))
    hashes = {"signature": signature, "body": body}
    return {
        "file": definition.file,
        **{name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in hashes.items()},
    }


class _Source:
    """A host's files, read as they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019 - lives as long as one command
    def body(self, file: Path) -> list[ast.stmt]:
        try:
            return parse(file.read_bytes()).body
        except SyntaxError:  # then all that is in it is gone
            return []

    def find(self, symbol: str, seen: frozenset[str] = frozenset()) -> _Definition | None:
        """Find where ``symbol`` is defined, through imports; ``seen`` are those that led here."""
        parts = symbol.split(".")
        for length in range(len(parts) - 1, 0, -1):
            module = self.root.joinpath(*parts[:length])
            for file in (module.with_suffix(".py"), module / "__init__.py"):
                if file.is_file():
                    return None if symbol in seen else self._find_in(file, parts[length:], seen | {symbol})
        return None

    def search(self, symbol: str) -> str | None:
        """Look for a definition of the same name in the host's other files."""
        package, *parts = symbol.split(".")
        # A method moves with its class, whose name is written large.
        names = parts[-2:] if len(parts) > 1 and parts[-2].lstrip("_")[:1].isupper() else parts[-1:]
        for file in sorted((self.root / package).rglob("*.py")):
            if names[0].encode() in file.read_bytes() and (found := self._find_in(file, names)):
                return found.file
        return None

    def _find_in(self, file: Path, names: list[str], seen: frozenset[str] | None = None) -> _Definition | None:
        """Find a function, or a class and a method, from ``file`` on; without ``seen`` in no other file."""
        bindings = list(_bindings(self.body(file), names[0]))
        for statement in [each for each in bindings if isinstance(each, ast.ImportFrom)]:
            module = self._module(file, statement)
            if seen is not None:
                original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == names[0])
                if found := self.find(".".join([*module, original, *names[1:]]), seen):
                    return found
            if (self.root / module[0]).is_dir():
                bindings.remove(statement)  # of the host, which has it no more; another package's is what there is
        for name in names[1:]:
            classes = [each for each in bindings if isinstance(each, ast.ClassDef)]
            bindings = [found for each in classes for found in _bindings(each.body, name)]
        return _Definition(str(file.relative_to(self.root)), bindings) if bindings else None

    def _module(self, file: Path, statement: ast.ImportFrom) -> list[str]:
        """Write the module of ``from MODULE import``, which may be relative, as its parts."""
        parts = statement.module.split(".") if statement.module else []
        if not statement.level:
            return parts
        package = file.relative_to(self.root).parent.parts
        return [*package[: len(package) - statement.level + 1], *parts]


def _bindings(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """Yield the statements that bind ``name``, those in if, try and with included."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound = statement.name == name
            case ast.Assign():
                bound = any(isinstance(each, ast.Name) and each.id == name for each in statement.targets)
            case ast.AnnAssign():
                bound = isinstance(statement.target, ast.Name) and statement.target.id == name
            case ast.Import() | ast.ImportFrom():
                bound = any((alias.asname or alias.name) == name for alias in statement.names)
            case _:
                bound = False
                for field in ("body", "orelse", "finalbody"):
                    yield from _bindings(getattr(statement, field, []), name)
                for handler in getattr(statement, "handlers", []):
                    yield from _bindings(handler.body, name)
        if bound:
            yield statement


def _signature(statement: ast.stmt) -> str:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return _canonical(statement.args)
        case ast.ClassDef():
            return _canonical(statement.bases)
    return ""


def _canonical(node: Any) -> str:
    """Write a tree without docstrings, and without what is empty, which Pythons write differently."""
    if isinstance(node, list):
        return f"[{', '.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    written = (f"{name}={_canonical(value)}" for name, value in fields.items() if value is not None and value != [])
    return f"{type(node).__name__}({', '.join(written)})"
