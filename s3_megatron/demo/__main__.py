"""``python -m s3_megatron.demo [--engine NAME] [--optimizer NAME]``: what ``make demo`` runs."""

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
from s3_megatron.demo.runs import RECIPE, RIVALS, iterations_in_all, kill_at, load, rival, with_data
from s3_megatron.demo.tokens import tokenize
from s3_megatron.errors import S3Error
from s3_megatron.jobs.forecast import Forecast
from s3_megatron.jobs.progress import print_line, stage_line
from s3_megatron.jobs.render import check_folder
from s3_megatron.jobs.trial import Trial

RUNS = Path("runs")
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of the ranks: the optimizer's run, the killed one and its resume, its rival's.
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
    parser.add_argument(
        "--optimizer", metavar="NAME", default="s3", help=f"{' or '.join(RIVALS)}; default: %(default)s"
    )
    asked = parser.parse_args()
    console = Console(highlight=False)
    try:
        demonstrate(console, asked.engine, asked.optimizer)
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


def demonstrate(console: Console, chosen: str | None = None, optimizer: str = "s3") -> None:
    """Build the corpus, train three times with the ``chosen`` engine or the recipe's, and report under ``runs``."""
    names = optimizer, rival(optimizer)  # before anything is built: there may be no such optimizer, or engine
    engine = ENGINES[load(optimizer, chosen).recipe.engine]
    check_folder(RUNS.absolute())
    preflight.check(engine, console)
    with preflight.own_folder(RUNS):
        _demonstrate(console, chosen, names, RUNS / engine.results_of(optimizer))


def _demonstrate(console: Console, chosen: str | None, names: tuple[str, str], folder: Path) -> None:
    started = time.monotonic()
    with stage_line(console, "looking for GPUs", None):
        import torch

        gpus = torch.cuda.device_count()
    ours, theirs = (load(optimizer, chosen, gpus) for optimizer in names)
    forecast = Forecast(partial(print_line, console), _STARTS, iterations_in_all(ours.recipe))
    text = corpus.build(RUNS / "corpus", console)
    tokens = tokenize(text, ours.recipe.model.vocab_size, console)
    ours, theirs = with_data(ours, tokens.data), with_data(theirs, tokens.data)
    preflight.set_aside(folder, console)
    kind = "GPUs" if gpus else "processes without a GPU (rehearsal)"
    name, title = names[0], report.title(names[0])
    print_line(console, f"training on {ours.ranks} {kind}; runs under {folder}: s3-megatron status {folder}/{name}")
    Trial.of(ours, folder / name, title, forecast).train(console)
    killed = Trial.of(ours, folder / f"{name}-killed", f"{title}, one rank killed", forecast)
    interruption = killed.train_through_a_kill(kill_at(ours.recipe), console)
    Trial.of(theirs, folder / names[1], report.title(names[1]), forecast).train(console)
    with stage_line(console, "report", None):
        from s3_megatron.demo import figure  # matplotlib takes a second

        outcome = report.Outcome.read(folder, names, interruption)
        figures = {"python": text.python, "documents": text.documents, "bytes": text.bytes}
        figures |= {"train_tokens": tokens.train, "validation_tokens": tokens.validation}
        found = report.summarize(outcome, ours.recipe, theirs.recipe, gpus=gpus, corpus=figures)
        report.write_json(folder / "report.json", found)
        figure.draw(folder / "report.png", outcome, found)
    console.print(report.table(found))
    print_line(console, f"{folder}/report.json, {folder}/report.png; {time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
