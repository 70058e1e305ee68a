"""Records: an experiment's folder in a form to keep with the source, in benchmarks/records/DATE-NAME."""

import lzma
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, report
from s3_megatron.evidence.experiments import Experiment
from s3_megatron.evidence.reading import source
from s3_megatron.files import publish

LIMIT = 5 << 20  # bytes of a record
CELLS = "cells.jsonl.xz"


def pack(name: str, experiment: Experiment, folder: Path, records: Path) -> Path:
    """Write ``folder``'s cells, report and pictures to ``records``/DATE-NAME; returns that folder.

    ``name`` is as the experiment was loaded. The cells are as they are, and compressed; the report has commits,
    versions and machines. Other pages there, as ``evidence.engines`` writes one, go along.

    Raises:
        S3Error: there are no cells, the record exists, is too large, or cannot be written.
    """
    target = records / f"{datetime.now(UTC):%Y-%m-%d}-{experiment.name}"
    if target.exists():
        raise S3Error(f"{target} exists: records stay as they are; move it away, or give another folder by --record")
    report.write(experiment, folder)
    _, found = analysis.read(folder / "cells.jsonl", experiment)
    if not found.finished:
        raise S3Error(f"{folder} has no finished cell: there is nothing to record yet")
    try:
        records.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=records, prefix=".partial-") as scratch:
            whole = Path(scratch, target.name)
            whole.mkdir()
            for file in (source(name), *sorted(folder.glob("*.md")), *sorted(folder.glob("*.png"))):
                shutil.copyfile(file, whole / (f"{experiment.name}.yaml" if file == source(name) else file.name))
            data = (folder / "cells.jsonl").read_bytes()
            (whole / CELLS).write_bytes(lzma.compress(data[: data.rfind(b"\n") + 1]))
            size = sum(file.stat().st_size for file in whole.iterdir())
            if size > LIMIT:
                raise S3Error(f"{folder} makes a record of {size / 2**20:.1f} MiB: at most {LIMIT >> 20} are kept")
            for file in whole.iterdir():
                publish(file, file)  # on the disk before the folder has its name
            os.replace(whole, target)
    except OSError as error:
        raise S3Error(f"{target} cannot be written: {error.strerror or error}") from None
    return target
