"""``make evidence-quick``: a tiny comparison from plan to record, in a folder of its own."""

import lzma
import math
import pydoc_data.topics
import shutil
from pathlib import Path

from rich.console import Console

from s3_megatron import machine
from s3_megatron.errors import S3Error
from s3_megatron.evidence import experiments, record, report
from s3_megatron.evidence.compare import compare
from s3_megatron.evidence.text import BLOCK, EVERY
from s3_megatron.files import write_file

NAME = "quick"


def text() -> bytes:
    """Return what every Python has, its own documentation, as often as gives one block for validation."""
    topics = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()
    size = BLOCK * EVERY
    return (topics * (size // len(topics) + 1))[: size + 1]


def write_corpus(path: Path) -> None:
    """Write that text where an experiment reads it."""
    write_file(path, lzma.compress(text(), preset=0))


def run(folder: Path, console: Console) -> Path:
    """Run the experiment from nothing, and pack its record; returns the record's folder.

    Raises:
        S3Error: it is not whole at the end.
    """
    experiment = experiments.load(NAME)
    write_corpus(Path(experiment.text))
    shutil.rmtree(folder, ignore_errors=True)
    if not compare(experiment, folder, console, device="cpu", minutes=math.inf, workers=machine.cores()):
        raise S3Error(f"{folder} has cells to run yet, and nothing was to stop it")
    console.print(
        report.write(experiment, folder).read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True
    )
    return record.pack(NAME, experiment, folder, folder)


if __name__ == "__main__":
    machine.use_utf8()
    print(f"wrote {run(Path('runs/evidence/quick'), Console())}")
