"""Running many checks on ranks that are already there: one launch runs all that a session has selected."""

import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from unittest import SkipTest

import torch.distributed as dist

from s3_megatron.errors import S3Error
from tests.ranks import ranks

if TYPE_CHECKING:
    import pytest  # the ranks do without

_SKIPPED = "skipped: "


def selected(request: "pytest.FixtureRequest", **params: object) -> list[str]:
    """The checks that this session runs in the fixture's file, of tests with ``params``: one can be run alone."""
    calls = [item.callspec.params for item in request.session.items if item.path == request.path]
    return list(dict.fromkeys(call["check"] for call in calls if call.items() >= params.items()))


def launch(worker: str, names: Sequence[str], nproc: int, folder: Path) -> dict[str, str]:
    """What each of the checks ``names`` of a module returned on ``nproc`` ranks, which share ``folder``."""
    if not names:
        return {}
    output = folder / f"results-{nproc}.json"
    done = ranks(["-m", worker, str(output), str(folder), *names], nproc, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(output.read_text())


def run(checks: Mapping[str, Callable[[], object]], names: Sequence[str], output: Path) -> None:
    """Run the checks ``names`` on every rank; rank 0 writes to ``output``, as JSON, what went wrong in each, or "".

    A check raises on every rank or on none; SkipTest where it does not apply to the host's version.
    """
    mine: dict[str, str] = {}
    for name in names:
        started = time.monotonic()
        try:
            checks[name]()
            mine[name] = ""
        except SkipTest as reason:
            mine[name] = f"{_SKIPPED}{reason}"
        except Exception:
            mine[name] = traceback.format_exc()
            # At once: where one rank raised alone, the others wait for it until the launch times out.
            print(f"rank {dist.get_rank()}: {name}\n{mine[name]}", file=sys.stderr, flush=True)
        if dist.get_rank() == 0:
            print(f"{time.monotonic() - started:.1f} s: {name}", flush=True)
    ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        output.write_text(json.dumps({name: next(filter(None, (r[name] for r in ranks)), "") for name in mine}))


def passed(outcome: str) -> None:
    """Judge, in pytest, what ``run`` wrote of a check: it fails, or is skipped where it raised SkipTest."""
    import pytest  # the ranks do without

    if outcome.startswith(_SKIPPED):
        pytest.skip(outcome.removeprefix(_SKIPPED))
    assert outcome == "", outcome


def in_files(paths: Iterable[Path]) -> list[str]:
    """The names of the checks that are defined in these files, which are not imported: that takes the ranks' host."""
    return [name for path in paths for name in re.findall(r"^def (check_\w+)", path.read_text(), flags=re.MULTILINE)]


def named(*modules: ModuleType) -> dict[str, Callable[[], object]]:
    """The functions of these modules whose name starts with ``check_``; two of one name are refused."""
    found: dict[str, Callable[[], object]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("check_") and callable(value):
                assert found.setdefault(name, value) is value, f"{name} is defined twice"
    return found


def shared_folder() -> Path:
    """A new folder that every rank knows."""
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return Path(str(box[0]))


def refuses(call: Callable[[], object], *advice: str) -> None:
    """Assert that ``call`` raises S3Error with all of ``advice`` in one line."""
    try:
        call()
    except S3Error as error:
        text = str(error)
        assert "\n" not in text and all(piece in text for piece in advice), text
    else:
        raise AssertionError(f"not refused, where advice with {advice} was wanted")
