"""``python -m s3_megatron.demo [--engine NAME]``: what ``make demo`` runs."""

import argparse
import logging
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from s3_megatron import machine
from s3_megatron.demo import corpus, preflight, report
from s3_megatron.demo.engines import ENGINES
from s3_megatron.demo.runs import RECIPE, iterations_in_all, kill_at, load, with_data
from s3_megatron.demo.tokens import tokenize
from s3_megatron.errors import S3Error
from s3_megatron.jobs.forecast import Forecast
from s3_megatron.jobs.progress import print_line, stage_line
from s3_megatron.jobs.render import check_folder
from s3_megatron.jobs.trial import Trial

RUNS = Path("runs")
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of the ranks: S3's run, the killed one and its resume, AdamW's.
_STARTS = 4


def main() -> None:
    """Run the demonstration; ends with 2 and one line on a mistake, with 128 + its number on a signal."""
    machine.use_utf8()
    for number in _ENDINGS:
        # A shell's background jobs ignore SIGINT: these do not. Under nohup SIGHUP stays ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    # It warns that a machine without a GPU has none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="python -m s3_megatron.demo", description=__doc__)
    parser.add_argument("--engine", metavar="NAME", help=f"megatron or deepspeed; default: what {RECIPE}.yaml says")
    chosen = parser.parse_args().engine
    console = Console(highlight=False)
    try:
        demonstrate(console, chosen)
    except S3Error as error:
        _end(2, f"error: {error}")
    except OSError as error:  # a disk that fills up, a folder that is taken away
        _end(2, f"error: {error.filename or RUNS} cannot be read or written: {error.strerror or error}")
    except SystemExit as stop:
        _end(stop.code, "stopped; every rank has ended" if isinstance(stop.code, int) and stop.code > 128 else None)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every ``with``, which ends the ranks."""
    sys.exit(128 + number)


def _end(code: int | str | None, text: str | None) -> NoReturn:
    """Print why, as well as a terminal that may be gone allows, and leave."""
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    if text is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def demonstrate(console: Console, chosen: str | None = None) -> None:
    """Build the corpus, train three times with the ``chosen`` engine or the recipe's, and report under ``runs``."""
    engine = ENGINES[load("s3", chosen).recipe.engine]  # before anything is built: there may be no such engine
    check_folder(RUNS.absolute())
    preflight.check(engine, console)
    with preflight.own_folder(RUNS):
        _demonstrate(console, chosen, RUNS / engine.results)


def _demonstrate(console: Console, chosen: str | None, folder: Path) -> None:
    started = time.monotonic()
    with stage_line(console, "looking for GPUs", None):
        import torch

        gpus = torch.cuda.device_count()
    s3, adamw = (load(optimizer, chosen, gpus) for optimizer in ("s3", "adamw"))
    forecast = Forecast(partial(print_line, console), _STARTS, iterations_in_all(s3.recipe))
    text = corpus.build(RUNS / "corpus", console)
    tokens = tokenize(text, s3.recipe.model.vocab_size, console)
    s3, adamw = with_data(s3, tokens.data), with_data(adamw, tokens.data)
    preflight.set_aside(folder, console)
    kind = "GPUs" if gpus else "processes without a GPU (rehearsal)"
    print_line(console, f"training on {s3.ranks} {kind}; runs under {folder}: s3-megatron status {folder}/s3")
    Trial.of(s3, folder / "s3", "S3", forecast).train(console)
    killed = Trial.of(s3, folder / "s3-killed", "S3, one rank killed", forecast)
    interruption = killed.train_through_a_kill(kill_at(s3.recipe), console)
    Trial.of(adamw, folder / "adamw", "AdamW", forecast).train(console)
    with stage_line(console, "report", None):
        from s3_megatron.demo import figure  # matplotlib takes a second

        outcome = report.Outcome.read(folder, interruption)
        figures = {"python": text.python, "documents": text.documents, "bytes": text.bytes}
        figures |= {"train_tokens": tokens.train, "validation_tokens": tokens.validation}
        found = report.summarize(outcome, s3.recipe, adamw.recipe, gpus=gpus, corpus=figures)
        report.write_json(folder / "report.json", found)
        figure.draw(folder / "report.png", outcome, found)
    console.print(report.table(found))
    print_line(console, f"{folder}/report.json, {folder}/report.png; {time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
