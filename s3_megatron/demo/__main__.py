"""``python -m s3_megatron.demo [--engine NAME]``: what ``make demo`` runs."""

import argparse
import logging
import shutil
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from s3_megatron.demo import corpus, figure, report
from s3_megatron.demo.engines import ENGINES
from s3_megatron.demo.runs import RECIPE, kill_at, load, trial, with_data
from s3_megatron.demo.tokens import tokenize
from s3_megatron.errors import S3Error

RUNS = Path("runs")


def main() -> None:
    """Run the demonstration; ends with status 1 and one line on a mistake, 130 on Ctrl-C."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))  # through every ``with``, which ends the ranks
    # It warns that a machine without a GPU has none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="python -m s3_megatron.demo", description=__doc__)
    parser.add_argument("--engine", metavar="NAME", help=f"megatron or deepspeed; default: what {RECIPE}.yaml says")
    chosen = parser.parse_args().engine
    console = Console(highlight=False)
    try:
        demonstrate(console, chosen)
    except S3Error as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print("stopped; every rank has ended")
        sys.exit(130)


def demonstrate(console: Console, chosen: str | None = None) -> None:
    """Build the corpus, train three times with the ``chosen`` engine or the recipe's, and report under ``runs``."""
    started = time.monotonic()
    engine = load("s3", chosen).recipe.engine  # before anything is built: there may be no such engine
    with console.status("looking for GPUs"):
        import torch

        gpus = torch.cuda.device_count()
    s3, adamw = (load(optimizer, chosen, gpus) for optimizer in ("s3", "adamw"))
    text = corpus.build(RUNS / "corpus")
    console.print(f"corpus: {text.bytes / 1e6:.1f} MB in {text.documents} documents of Python {text.python}")
    tokens = tokenize(text, s3.recipe.model.vocab_size, console)
    s3, adamw = with_data(s3, tokens.data), with_data(adamw, tokens.data)
    folder = RUNS / ENGINES[engine].results
    set_aside(folder, console)
    console.print(
        f"training on {s3.ranks} {'GPUs' if gpus else 'processes without a GPU (rehearsal)'}; logs under {folder}"
    )
    trial(s3, folder / "s3", "S3").train(console)
    killed = trial(s3, folder / "s3-killed", "S3, one rank killed")
    interruption = killed.train_through_a_kill(kill_at(s3.recipe), console)
    trial(adamw, folder / "adamw", "AdamW").train(console)
    outcome = report.Outcome.read(folder, interruption)
    figures = {"python": text.python, "documents": text.documents, "bytes": text.bytes}
    figures |= {"train_tokens": tokens.train, "validation_tokens": tokens.validation}
    found = report.summarize(outcome, s3.recipe, adamw.recipe, gpus=gpus, corpus=figures)
    report.write_json(folder / "report.json", found)
    figure.draw(folder / "report.png", outcome, found)
    console.print(report.table(found))
    console.print(f"{folder}/report.json, {folder}/report.png; {time.monotonic() - started:.0f} seconds")


def set_aside(folder: Path, console: Console) -> None:
    """Move the results of an earlier demonstration to ``FOLDER.previous``, replacing what is there."""
    if folder.exists():
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        console.print(f"the last demonstration is now in {previous}")


if __name__ == "__main__":
    main()
