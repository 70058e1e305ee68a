"""`s3-megatron`: what a person types; each command is one call into the package, imported when it runs."""

import importlib
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import s3_megatron
from s3_megatron import machine
from s3_megatron.cli import bench, data, jobs, patch
from s3_megatron.cli.output import console, errors, line, printable, report
from s3_megatron.errors import S3Error

app = typer.Typer(
    name="s3-megatron",
    help="Train with S3 (SoftSignSGD, an optimizer; not Amazon's storage) in Megatron-LM and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(jobs.app)
app.add_typer(patch.app)


def main() -> None:
    """Run the command line; a mistake a user can mend is one red line and exit code 2."""
    machine.use_utf8()
    try:
        app()
    except S3Error as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "s3_megatron"):
            raise
        _refuse(
            f"this command needs {package}, which {sys.executable} does not have: s3-megatron doctor names what is "
            "missing and how to get it"
        )


def _refuse(text: str) -> NoReturn:
    errors.print(printable(f"error: {text}"), style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"s3-megatron {s3_megatron.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor() -> None:
    """Say what works here, what is missing and how to get it; exit code 1 if no training can run."""
    from s3_megatron.doctor import examine

    with errors.status("looking (imports every package once)"):
        found = examine()
    report(found.rows)
    raise typer.Exit(0 if found.can_train else 1)


@app.command()
def compare(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="A file of configs/experiments by name, or a file's path.")
    ],
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the runs train.")] = "cpu",
    minutes: Annotated[float, typer.Option(metavar="M", min=0.1, help="Stop by itself before.")] = math.inf,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where cells.jsonl is.", show_default="runs/evidence/EXPERIMENT"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Runs at once.", show_default="one a core")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it takes here; train nothing.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.md and pictures of the cells there; train nothing.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pack cells and report into DIR/DATE-EXPERIMENT; train nothing."),
    ] = None,
) -> None:
    """Train an optimizer comparison's runs (docs/evidence.md) and report; run again, it goes on where it was."""
    began = time.monotonic()  # a busy machine imports for a minute
    from s3_megatron.evidence import reading

    if device not in ("cpu", "cuda"):
        raise S3Error(f"--device is {device}: it must be cpu or cuda")
    reading.read(experiment)  # a mistyped name is refused before torch is imported
    import torch

    try:
        from s3_megatron.evidence import experiments
        from s3_megatron.evidence import report as reports
        from s3_megatron.evidence.compare import compare as run
        from s3_megatron.evidence.record import pack
    except ModuleNotFoundError as error:
        raise S3Error(f"compare needs {error.name}: pip install 's3-megatron[evidence]'") from None
    with suppress(ModuleNotFoundError):  # now, within the minutes, rather than after them for the report
        importlib.import_module("s3_megatron.evidence.pictures")

    if device == "cuda" and not torch.cuda.is_available():
        raise S3Error("--device cuda needs a GPU, and torch sees none")
    asked = experiments.load(experiment)
    folder = out or Path("runs/evidence") / asked.name
    if record:
        line(f"wrote {pack(experiment, asked, folder, record)}")
        return
    if report:
        line(f"wrote {reports.write(asked, folder)}")
        return
    count = workers or (1 if device == "cuda" else machine.cores())
    minutes -= (time.monotonic() - began) / 60
    whole = run(asked, folder, console, device=device, minutes=minutes, workers=count, dry_run=dry_run)
    if not dry_run:
        line(f"{folder} is whole" if whole else f"{folder} has cells to run yet: the same command goes on")
        line(f"wrote {reports.write(asked, folder)}")
