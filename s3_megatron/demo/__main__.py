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
from s3_megatron.demo.recipe import ROOT, engine, load
from s3_megatron.demo.runs import Trainer
from s3_megatron.demo.tokens import tokenize
from s3_megatron.errors import S3Error

CONFIG = ROOT / "configs/model/gpt2_tiny.yaml"
RUNS = Path("runs")


def main() -> None:
    """Run the demonstration; ends with status 1 and one line on a mistake, 130 on Ctrl-C."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))  # through every ``with``, which ends the ranks
    # It warns that a machine without a GPU has none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="python -m s3_megatron.demo", description=__doc__)
    parser.add_argument("--engine", metavar="NAME", help=f"megatron or deepspeed; default: what {CONFIG.name} says")
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
    config = load(CONFIG)
    if chosen is not None:
        config["engine"] = chosen
    trains = engine(config)
    with console.status("looking for GPUs"):
        import torch

        gpus = torch.cuda.device_count()
    text = corpus.build(RUNS / "corpus")
    console.print(f"corpus: {text.bytes / 1e6:.1f} MB in {text.documents} documents of Python {text.python}")
    tokens = tokenize(text, console)
    folder = RUNS / trains.results
    set_aside(folder, console)
    trainer = Trainer(config, tokens.flags, folder, gpus, console)
    console.print(
        f"training on {trainer.ranks} {'GPUs' if gpus else 'processes without a GPU (rehearsal)'}; logs under {folder}"
    )
    trainer.train("s3", "S3", "s3")
    interruption = trainer.train_through_a_kill("s3-killed", "S3, one rank killed", "s3")
    trainer.train("adamw", "AdamW", "adam")
    outcome = report.Outcome.read(folder, interruption)
    figures = {"python": text.python, "documents": text.documents, "bytes": text.bytes}
    figures |= {"train_tokens": tokens.train, "validation_tokens": tokens.validation}
    found = report.summarize(outcome, config, gpus=gpus, corpus=figures)
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
