"""What of the hosts S3 goes through: the list is whole, and every kind of difference is seen."""

import ast
import json
import re
from pathlib import Path

import pytest

from s3_megatron.patch import record, symbols
from s3_megatron.patch.place import Place, find
from s3_megatron.patch.release import PATCHES, load, nearest, versions
from s3_megatron.swap import SymbolSwap
from tests.patch.hosts import copy_whole, patched_hosts
from tests.terminal import run_main

ROOT = Path(__file__).parents[2]
ENGINES = {"megatron-lm": ("engines/megatron", "rehearsal"), "deepspeed": ("engines/deepspeed",)}


@pytest.fixture(scope="module", params=patched_hosts())
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(host: str, tmp_path: Path) -> Place:
    return find(copy_whole(host, tmp_path))


def verdicts(place: Place) -> dict[str, str]:
    return {each.name: each.found for each in symbols.compare(place, load(place.host, place.version))}


def test_recording_a_release_again_makes_what_is_stored(place: Place) -> None:
    """So the record is of this list and this code; and of the patch, which the nearest release's lines make."""
    stored = PATCHES / place.host / place.version
    patch = record.make_patch(place)
    assert patch == Path(f"{stored}.patch").read_text()
    assert record.make_record(place, patch) == json.loads(Path(f"{stored}.json").read_text())
    assert set(verdicts(place).values()) == {symbols.SAME}


def test_what_is_replaced_is_listed(host: str) -> None:
    """The engines' own books are asked, after install() and register()."""
    if host == "megatron-lm":
        from s3_megatron.engines.megatron.install import _swap, install, uninstall

        install()
        seen, undo = _replaced(_swap), uninstall
    else:
        from s3_megatron.engines.deepspeed.register import _swap, register, unregister

        register()
        seen, undo = _replaced(_swap), unregister
    undo()
    assert seen
    # accelerate is no part of DeepSpeed.
    assert {name for name in seen if not name.startswith("accelerate.")} - set(symbols.listed(host)) == set()


def _replaced(swap: SymbolSwap) -> set[str]:
    return {f"{_dotted(owner)}.{name}" for owner, name, _ in swap._undo}


def _dotted(owner: object) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return str(getattr(owner, "__name__", owner))


def test_what_is_imported_is_listed(host: str) -> None:
    """Every name of a host that the engines and the rehearsal import, itself or parts of it; the version apart."""
    known = symbols.listed(host)
    package = "megatron" if host == "megatron-lm" else "deepspeed"
    missing = [
        f"{file.name}: {name}"
        for folder in ENGINES[host]
        for file in sorted((ROOT / "s3_megatron" / folder).glob("*.py"))
        for name in _imports(file, package)
        if not any(each == name or each.startswith(f"{name}.") for each in known) and "package_info" not in name
    ]
    assert missing == []


def test_what_is_replaced_on_objects_is_listed(host: str) -> None:
    """By its last name: ``replace(wrapper, "step", ...)`` says nothing of the wrapper's class."""
    names = {
        call.args[1].value
        for file in (ROOT / "s3_megatron" / ENGINES[host][0]).glob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("replace") and len(call.args) == 3
        if isinstance(call.args[1], ast.Constant)
    } - {"map_pytorch_optim_to_deepspeed", "fill_match"}  # accelerate's and transformers'
    assert names
    assert names - {symbol.rpartition(".")[2] for symbol in symbols.listed(host)} == set()


def _imports(file: Path, package: str) -> list[str]:
    statements = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return [
        f"{each.module}.{alias.name}"
        for each in statements
        if (each.module or "").split(".")[0] == package
        for alias in each.names
    ]


def _function(place: Place, symbol: str) -> tuple[Path, ast.FunctionDef, list[str]]:
    """Where a function's source is, and what: found here by another way than the code under test."""
    name = symbol.rpartition(".")[2]
    file = place.root / load(place.host, place.version).symbols[symbol]["file"]
    lines = file.read_text().splitlines(keepends=True)
    found = [each for each in ast.walk(ast.parse(file.read_text())) if getattr(each, "name", "") == name]
    (function,) = [each for each in found if isinstance(each, ast.FunctionDef)]
    return file, function, lines


# One of each host that is a plain function, and one that is imported where it is used.
PLAIN = {
    "megatron-lm": "megatron.training.training.training_log",
    "deepspeed": "deepspeed.runtime.engine.DeepSpeedEngine._take_model_step",
}
IMPORTED = {
    "megatron-lm": "megatron.core.optimizer.optimizer.get_grad_norm_fp32",
    "deepspeed": "deepspeed.runtime.engine.is_zero_supported_optimizer",
}


def test_every_kind_of_difference(place: Place) -> None:
    """In copies of the real files; what is left alone stays "same"."""
    symbol = PLAIN[place.host]
    name = symbol.rpartition(".")[2]
    file, function, lines = _function(place, symbol)
    original = file.read_text()
    body = function.body[0]
    indent = " " * body.col_offset
    for at, text, wanted in (
        (body.lineno - 1, f'{indent}"""Another docstring."""\n\n{indent}# and a comment\n', symbols.SAME),
        (body.lineno - 1, f"{indent}extra = 1\n", "body changed"),
    ):
        if ast.get_docstring(function) is not None:
            at = body.end_lineno or 0
            text = text.replace('"""Another docstring."""', "# another comment")
        file.write_text("".join([*lines[:at], text, *lines[at:]]))
        assert verdicts(place)[symbol] == wanted
    for new, wanted in ((f"def {name}(s3_added, ", "signature changed"), (f"def {name}_of_theirs(", "gone")):
        file.write_text(original.replace(f"def {name}(", new))
        found = verdicts(place)
        assert found.pop(symbol) == wanted
        assert set(found.values()) == {symbols.SAME}


def test_what_has_moved_is_found(place: Place) -> None:
    """The definition goes into a new file; the module that used it imports it from there."""
    symbol = IMPORTED[place.host]
    name = symbol.rpartition(".")[2]
    file, function, lines = _function(place, symbol)
    start = min([function.lineno, *(each.lineno for each in function.decorator_list)]) - 1
    text = "".join(lines[start : function.end_lineno])
    package = "megatron" if place.host == "megatron-lm" else "deepspeed"
    new = place.root / package / "new_home.py"
    new.write_text(text)
    rest = lines[:start] + lines[function.end_lineno :]
    file.write_text(f"from {package}.new_home import {name}\n" + "".join(rest))
    assert verdicts(place)[symbol] == f"moved to {package}/new_home.py"
    file.write_text("".join(rest))
    assert verdicts(place)[symbol] == f"moved to {package}/new_home.py", "although nothing imports it"


def test_the_command_and_the_warnings(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: str) -> tuple[int, str, str]:
        return run_main(monkeypatch, "patch", command, str(place.root)), *capsys.readouterr()

    total = len(load(place.host, place.version).symbols)
    code, shown, _ = run("symbols")
    assert code == 0 and shown.count(" same ") == total
    assert f"0 of {total} symbols are not as in {place.version}\n" in shown
    assert run("apply")[2] == "", "no warning"

    symbol = PLAIN[place.host]
    file, _, lines = _function(place, symbol)
    name = symbol.rpartition(".")[2]
    file.write_text("".join(lines).replace(f"def {name}(", f"def {name}(s3_added, "))
    code, shown, _ = run("symbols")
    assert code == 1 and re.search(rf"^{re.escape(symbol)} +warning +signature changed *$", shown, re.MULTILINE)
    warning = f"warning: {symbol}: signature changed since {place.host} {place.version}; S3 goes through it"
    for command in ("apply", "verify"):
        code, _, error = run(command)
        assert code == 0 and warning in error


def test_an_unknown_version_is_compared_with_the_nearest(host: str) -> None:
    known = versions(host)
    assert nearest(host, "99.0.0") == known[-1]
    assert nearest(host, "0.1.0") == known[0]
    assert nearest(host, f"{known[0]}rc1") == known[0]
    assert [nearest(host, version) for version in known] == known
    minors = [version.rpartition(".")[0] for version in known]
    for patch in (0, 99):
        assert [nearest(host, f"{minor}.{patch}") for minor in minors] == known
