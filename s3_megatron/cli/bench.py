"""`s3-megatron bench`: figures of this machine, as tables and as a file."""

import json
import shlex
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from s3_megatron import machine
from s3_megatron.cli.output import console, errors, line
from s3_megatron.errors import S3Error

app = typer.Typer(help="What a step costs here, and what the kernels do.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(metavar="N", min=1, help="Rounds that count; a time is their median.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything measured there too.")]


@app.command()
def step(
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the weights are.")] = "cpu",
    parameters: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Weights to step; may be given again.", show_default="1000000, 30000000, 200000000"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads on a CPU.", show_default="one a core")
    ] = None,
    repeats: Rounds = 9,
    json_file: JsonFile = None,
) -> None:
    """Time an optimizer step of S3 and of Adam: kernels, sizes, one tensor and a thousand."""
    import torch

    from s3_megatron.bench import step as bench

    if device not in ("cpu", "cuda"):
        raise S3Error(f"--device is {device}: it must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise S3Error("--device cuda needs a GPU, and torch sees none; what its kernel moves: s3-megatron bench triton")
    sizes = parameters or [1_000_000, 30_000_000, 200_000_000]
    if min(sizes) <= bench.SHARDS:
        raise S3Error(f"--parameters is {min(sizes)}: it must be more than {bench.SHARDS}, one for each tensor")
    with errors.status("measuring") as status:
        keep = partial(_keep, json_file)
        result = bench.measure(device, sizes, threads or machine.cores(), repeats, status.update, keep)
    for table in bench.tables(result):
        console.print(table)
    ceilings = f"stream {result.stream:.1f} GB/s, copy {result.copy:.1f} GB/s"
    line(f"{ceilings} on {result.machine['processor']}, kernel: {result.machine['kernel']}")
    for reason in result.missing:
        line(f"not measured: {reason}")
    if json_file is not None:
        line(f"wrote {json_file}")


def _keep(path: Path | None, result: Any) -> None:
    """Write what is measured so far: the large sizes come last, and take long."""
    if path is not None:
        from s3_megatron.bench import step as bench

        _store(path, bench.as_json(result, _command()))


@app.command()
def triton(json_file: JsonFile = None) -> None:
    """Compile the GPU kernel for four GPUs and count what it moves; needs no GPU."""
    from s3_megatron.bench import audit

    with errors.status("compiling"):
        rows = audit.rows()
    console.print(audit.table(rows))
    _write_json(json_file, audit.as_json(rows, _command()))


@app.command()
def megatron_step(rounds: Rounds = 15, json_file: JsonFile = None) -> None:
    """Time a step inside Megatron, by part: the host's separate passes, and S3's single one."""
    _run("megatron_step", "megatron", json_file, rounds=rounds)


@app.command()
def deepspeed_step(rounds: Rounds = 15, json_file: JsonFile = None) -> None:
    """Time an offloaded step inside DeepSpeed: S3, and DeepSpeed's own AdamW on the CPU."""
    _run("deepspeed_step", "deepspeed", json_file, rounds=rounds)


@app.command()
def kernel_instructions(json_file: JsonFile = None) -> None:
    """Count the instructions of each loop of the C++ kernel, and say what binds it; Linux on x86-64."""
    _run("kernel_instructions", "", json_file)


@app.command()
def rehearsal_products(
    rounds: Rounds = 5,
    dropout: Annotated[float, typer.Option(metavar="P", min=0, max=1, help="Of both kinds.")] = 0.0,
    json_file: JsonFile = None,
) -> None:
    """Time an iteration of the rehearsal with 16-bit products in float32, and with torch's own."""
    _run("rehearsal_products", "megatron", json_file, rounds=rounds, dropout=dropout)


@app.command()
def softmuon_map(
    columns: Annotated[int, typer.Option(metavar="N", min=8, help="Of the matrices.")] = 256,
    json_file: JsonFile = None,
) -> None:
    """Compare SoftMuon's map with the exact one, by precision and steps, and its work with Muon's."""
    _run("softmuon_map", "softmuon", json_file, columns=columns)


@app.command()
def softmuon_step(
    width: Annotated[int, typer.Option(metavar="N", min=8, help="Of the model.")] = 512,
    layers: Annotated[int, typer.Option(metavar="N", min=1, help="Of four matrices each.")] = 2,
    rounds: Rounds = 5,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the weights are.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Time a step of SoftMuon, hard and soft, beside torch's Muon and Megatron's."""
    _run("softmuon_step", "softmuon", json_file, width=width, layers=layers, rounds=rounds, device=device)


def _run(module: str, extra: str, json_file: Path | None, **options: Any) -> None:
    """Measure with ``s3_megatron.bench.MODULE``, whose packages ``extra`` installs; print and write what it finds."""
    try:
        bench = import_module(f"s3_megatron.bench.{module}")
        with errors.status("measuring"):
            measured = bench.measure(**options)
    except ModuleNotFoundError as error:
        raise S3Error(f"this needs {error.name}: pip install 's3-megatron[{extra}]'") from None
    for table in bench.tables(measured):
        console.print(table)
    _write_json(json_file, {"command": _command(), **measured})


def _command() -> str:
    return shlex.join(["s3-megatron", *sys.argv[1:]])


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        _store(path, content)
        line(f"wrote {path}")


def _store(path: Path, content: dict[str, Any]) -> None:
    from s3_megatron.files import write_file

    write_file(path, (json.dumps(content, indent=1) + "\n").encode())
