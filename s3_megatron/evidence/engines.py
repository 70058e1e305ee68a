"""``python -m s3_megatron.evidence.engines FOLDER``: an experiment's runs once more, as jobs of Megatron's own engine.

FOLDER is where ``s3-megatron compare engines --out FOLDER`` has put its cells. The jobs are ordinary ones, on this
machine's CPUs, in FOLDER/jobs; run again, the command goes on where it was. What it prints stays in FOLDER/engines.md.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch

from s3_megatron import machine
from s3_megatron.data.writer import bin_and_idx, new_dataset
from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, experiments, statistics, text
from s3_megatron.evidence.cells import Cell
from s3_megatron.evidence.experiments import Experiment
from s3_megatron.evidence.tables import table
from s3_megatron.evidence.text import Text
from s3_megatron.files import write_file
from s3_megatron.jobs import compose, runs, submit
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.render import render
from s3_megatron.watch.file import read_metrics

type Losses = dict[str, list[float]]  # of each contender, in the order of the seeds


def run(experiment: Experiment, folder: Path) -> str:
    """Train what is missing, and return the page.

    Raises:
        S3Error: the stack's runs are not whole, a job fails, or its model is not the stack's.
    """
    _, found = analysis.read(folder / "cells.jsonl", experiment)
    rows = [row for name, setup in found.plan.pairs() for row in found.final(name, setup)]
    if len(rows) != len(experiment.contenders) or not all(row.is_whole for row in rows):
        raise S3Error(
            f"{experiment.name} must have one setup and one rate a contender, and {folder} all of its runs: "
            f"s3-megatron compare {experiment.name} --out {folder}"
        )
    corpus = text.load(experiment.text, experiment.vocabulary)
    for name, part in (("train", corpus.train), ("validation", corpus.validation)):
        write_tokens(folder / "data" / name, part, experiment.vocabulary)
    jobs: Losses = {row.contender: [] for row in rows}
    for seed in experiment.seeds:  # whole pairs first
        for row in rows:
            cell = found.plan.cell(row.contender, row.setup, (row.rate, row.settings), seed)
            jobs[row.contender].append(train(cell, folder.resolve(), corpus))
    return page(experiment, {row.contender: [row.losses[seed] for seed in experiment.seeds] for row in rows}, jobs)


def write_tokens(prefix: Path, part: torch.Tensor, vocabulary: int) -> None:
    """Write tokens as a dataset of Megatron's, a document a block, unless it is there."""
    if bin_and_idx(prefix)[1].exists():
        return
    with new_dataset(prefix, vocabulary) as builder:
        for block in part.split(text.BLOCK):
            builder.add_document(block.numpy(), [len(block)])


def as_job(cell: Cell, folder: Path, validation: int) -> Job:
    """The run of a cell as a recipe on this machine's CPUs, in float32; ``validation`` is that part's tokens.

    Raises:
        S3Error: the recipes have no such optimizer, or it is given what its section does not have.
    """
    setup = cell.setup
    settings = json.loads(cell.settings)
    if cell.optimizer == "adamw":
        settings["beta1"], settings["beta2"] = settings.pop("betas")
    values = {
        "name": f"{cell.contender}-{cell.seed}",
        "model.num_layers": setup.layers,
        "model.hidden_size": setup.width,
        "model.num_attention_heads": setup.heads,
        "model.seq_length": setup.length,
        "model.vocab_size": setup.model.vocabulary,
        "data.mock": "false",
        "data.train": "data/train",
        "data.validation": "data/validation",
        "data.tokenizer": "gpt2",  # the flags below have the last word
        "schedule.global_batch_size": setup.batch,
        "schedule.train_iters": setup.steps,
        "schedule.lr_decay_style": setup.schedule,
        "schedule.lr_warmup_iters": round(setup.warmup * setup.steps),
        "schedule.min_lr_ratio": 0.0,
        "schedule.clip_grad": setup.clip,
        "schedule.seed": cell.seed,
        "schedule.eval_interval": setup.steps,
        "schedule.eval_iters": validation // (setup.length * setup.batch),
        "precision": "fp32",
        "checkpoint.save_interval": setup.steps,
        "checkpoint.save_retain_interval": "null",
        "optimizer": cell.optimizer,
        "optimizer.lr": cell.rate,
        "optimizer.weight_decay": setup.decay / cell.rate,
        **{f"optimizer.{name}": value for name, value in settings.items()},
        # NullTokenizer takes ids as they are, and adds one to the size that it is given (Megatron 0.19.2).
        "flags": f'["--tokenizer-type", "NullTokenizer", "--vocab-size", "{setup.model.vocabulary - 1}"]',
        "cluster.accelerator": "cpu",
        "cluster.data_dir": folder,
        "cluster.runs_dir": folder / "jobs",
    }
    return submit.here(compose.load("gpt2_tiny", "local", [f"{key}={value}" for key, value in values.items()]))


def train(cell: Cell, folder: Path, corpus: Text) -> float:
    """Run a cell as a job, if that has not finished yet, and return its last validation loss.

    Raises:
        S3Error: it failed, or the engine's model is not the stack's.
    """
    job = as_job(cell, folder, len(corpus.validation))
    path = submit.folder(job, job.recipe.name)
    if path.exists():
        run = runs.find(str(path))
        code = 0 if run.finished else submit.resume(run, print)
    else:
        run = runs.create(job, path, render(job, path))
        code = submit.start(run)
    if code:
        raise S3Error(f"{path.name} has failed (exit code {code}): see {run.job_log}; run this again, and it resumes")
    metrics = read_metrics(run.watch)
    weights = metrics.optimizer.parameters if metrics.optimizer else 0
    if weights != cell.setup.model.parameters():
        raise S3Error(f"{path.name} has {weights} weights, and the stack's model {cell.setup.model.parameters()}")
    return metrics.validation[cell.setup.steps].losses["lm_loss"]


def page(experiment: Experiment, stack: Losses, jobs: Losses) -> str:
    """Lay out both, and how far apart they are."""
    what = f"Final validation loss, mean and standard deviation over {len(experiment.seeds)} seeds."
    rows, each = [], []
    for name, ours in stack.items():
        theirs, reach = jobs[name], max(ours) - min(ours)
        rate = experiment.contenders[name].rates[0]
        apart = fmean(theirs) - fmean(ours)
        rows.append([name, f"{rate:g}", _spread(ours), _spread(theirs), f"{apart:+.4f}", f"{reach:.4f}"])
        each += [
            [name, str(seed), f"{one:.4f}", f"{other:.4f}"]
            for seed, one, other in zip(experiment.seeds, ours, theirs, strict=True)
        ]
    order, other = (sorted(losses, key=lambda name: fmean(losses[name])) for losses in (stack, jobs))
    first, *rivals = stack
    pairs = [
        f"{name} minus {first}, seed by seed: {_difference(stack[name], stack[first])} in the stack, "
        f"{_difference(jobs[name], jobs[first])} in Megatron's engine."
        for name in rivals
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    parts = [
        f"# {experiment.title}",
        f"{what} From a seed Megatron's engine draws other weights and another order than the stack.",
        table(["contender", "rate", "stack", "Megatron's engine", "apart", "range of the stack's seeds"], rows),
        f"By the means, the lowest first: {', '.join(order)} in the stack; {', '.join(other)} in Megatron's engine.",
        *pairs,
        "The runs:",
        table(["contender", "seed", "stack", "Megatron's engine"], each),
        f"{versions}; {machine.processor()}. The commit is the report's.",
    ]
    return "\n\n".join(parts) + "\n"


def _spread(losses: list[float]) -> str:
    return f"{fmean(losses):.4f}" + (f" +- {statistics.deviation(losses):.4f}" if len(losses) > 1 else "")


def _difference(rival: list[float], reference: list[float]) -> str:
    paired = statistics.paired(rival, reference)
    return f"{paired.mean:+.4f} (95% interval {paired.low:.4f} to {paired.high:.4f})"


def main() -> None:
    """Read the arguments, run, and print the page; ends with 2 and one line on a mistake."""
    machine.use_utf8()
    parser = argparse.ArgumentParser(prog="python -m s3_megatron.evidence.engines", description=__doc__)
    parser.add_argument("folder", type=Path, help="where s3-megatron compare has put the stack's cells")
    parser.add_argument("--experiment", default="engines", help="a name or a file (default: engines)")
    args = parser.parse_args()
    try:
        written = run(experiments.load(args.experiment), args.folder)
        write_file(args.folder / "engines.md", written.encode())
    except S3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(written)


if __name__ == "__main__":
    main()
