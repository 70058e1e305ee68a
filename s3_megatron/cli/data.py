"""`s3-megatron data`: text to Megatron's token files, and a look at them."""

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from s3_megatron.cli.output import console, errors, line
from s3_megatron.errors import S3Error

if TYPE_CHECKING:
    from s3_megatron.data import PrepareReport
    from s3_megatron.data.inputs import Inputs

app = typer.Typer(help="Text to Megatron's token files, and a look at them.", no_args_is_help=True)

# How many files a line names.
NAMED = 3

TokenizerName = Annotated[
    str,
    typer.Option(metavar="NAME", help="sentencepiece, gpt2, or hf:NAME (a folder, or a name on the Hugging Face hub)."),
]
TokenizerModel = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The SentencePiece model; with --train-tokenizer, where to write it."),
]


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Files, folders (in depth) or quoted globs: .txt (a file is a document), .jsonl, .ndjson and .json "
            "(a line is a document), each of them also with .gz, .bz2, .xz or .zst. Hidden names are passed over.",
        ),
    ],
    output: Annotated[
        str,  # a Path drops the slash that tells a folder
        typer.Option(
            metavar="PREFIX",
            help="Writes PREFIX.bin and PREFIX.idx, exactly these names: PREFIX is what Megatron's "
            "--data-path takes. A dataset that is there is never overwritten.",
        ),
    ],
    tokenizer: TokenizerName = "sentencepiece",
    tokenizer_model: TokenizerModel = None,
    train_tokenizer: Annotated[
        bool,
        typer.Option("--train-tokenizer", help="Train a SentencePiece model on the input first (PREFIX.model)."),
    ] = False,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="Size of the vocabulary to train.", show_default=False)
    ] = None,
    json_key: Annotated[str, typer.Option(metavar="KEY", help="Where the text of a line's JSON object is.")] = "text",
    append_eod: Annotated[
        bool,
        typer.Option("--append-eod", help="End each document with the tokenizer's end-of-document token."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes; never changes the output.", show_default="one a core"),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop at the first bad document. Else bad ones are skipped and counted."),
    ] = False,
) -> None:
    """Tokenize text into a dataset Megatron trains on."""
    if train_tokenizer != (vocab_size is not None):
        raise S3Error("--train-tokenizer and --vocab-size N go together: give both, or neither")
    from s3_megatron import data
    from s3_megatron.data.progress import progress_bar

    try:
        with progress_bar(errors) as advance:
            report = data.prepare(
                inputs,
                output,
                tokenizer=tokenizer,
                tokenizer_model=tokenizer_model,
                train_vocab_size=vocab_size,
                json_key=json_key,
                append_eod=append_eod,
                workers=workers,
                strict=strict,
                on_inputs=_print_inputs,
                on_progress=advance,
            )
    except KeyboardInterrupt:
        errors.print("interrupted: no dataset was written", style="red")
        raise typer.Exit(130) from None
    _print_report(report)


def _print_inputs(found: "Inputs") -> None:
    """What is taken and what is passed over, and why, before any of it is read."""
    from s3_megatron.data.sources import kind_of, shown

    table = Table(box=None, pad_edge=False)
    for heading in ("", "files", "MB", "what"):
        table.add_column(heading, justify="right" if heading in ("files", "MB") else "left", overflow="fold")
    kinds: dict[str, list[Path]] = {}
    for path in found.taken:
        kinds.setdefault(path.name[path.name.lower().rindex(kind_of(path) or "") :].lower(), []).append(path)
    for kind, paths in kinds.items():
        size = sum(path.stat().st_size for path in paths) / 1e6
        table.add_row("taken", f"{len(paths):,}", f"{size:,.1f}", Text(kind))
    for reason, count in Counter(reason for _, reason in found.passed).items():
        names = [shown(path) for path, why in found.passed if why == reason][:NAMED]
        more = ", ..." if count > NAMED else ""
        table.add_row("passed over", f"{count:,}", "", Text(f"{reason}: {', '.join(names)}{more}"))
    errors.print(table)


def _print_report(report: "PrepareReport") -> None:
    from s3_megatron.data.splits import DEFAULT_SPLIT, left_out

    line(
        f"wrote {report.prefix}.bin and .idx: {report.documents:,} documents, {report.tokens:,} tokens "
        f"({report.dtype}), {report.text_bytes:,} bytes of text, {report.text_bytes / report.tokens:.2f} a "
        f"token, {report.seconds:.1f} s"
    )
    for reason, count in report.skipped.items():
        places = report.skipped_where[reason]
        more = ", ..." if count > len(places) else ""
        line(f"skipped {count:,} with {reason}: {', '.join(places)}{more}")
    without = [path for path, count in report.files.items() if not count]
    if without:
        more = ", ..." if len(without) > NAMED else ""
        line(f"{len(without):,} of {len(report.files):,} files gave no document: {', '.join(without[:NAMED])}{more}")
    if names := left_out(report.documents):
        line(
            f"note: {report.documents:,} documents are too few for Megatron's default --split {DEFAULT_SPLIT}, which "
            f"leaves {' and '.join(names)} none: add --split 100,0,0 --eval-iters 0, or give each split data of its own"
        )
    line("flags for Megatron:")
    line(f"  {shlex.join(report.megatron_flags)}")


@app.command()
def inspect(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="The dataset: its path without .bin and .idx.")],
    tokenizer: TokenizerName = "sentencepiece",
    tokenizer_model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The SentencePiece model: decodes the start of the data."),
    ] = None,
) -> None:
    """Show what a dataset holds."""
    from s3_megatron import data

    report = data.inspect(prefix, tokenizer, tokenizer_model)
    table = Table(show_header=False, box=None)
    for name, value in {
        "documents": f"{report.documents:,}",
        "tokens": f"{report.tokens:,}",
        "dtype": report.dtype,
        "shortest document": f"{report.shortest:,} tokens",
        "median document": f"{report.median:,.0f} tokens",
        "longest document": f"{report.longest:,} tokens",
        "first ids": " ".join(map(str, report.sample_ids[:16])),
    }.items():
        table.add_row(name, value)
    console.print(table)
    if report.sample_text is None:
        line("to see text: --tokenizer-model FILE, or --tokenizer hf:NAME")
    else:
        line(f"\nthe first {len(report.sample_ids)} tokens as text:\n{report.sample_text}")
