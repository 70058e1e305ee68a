"""The commands from a recipe to a finished run."""

from pathlib import Path
from typing import Annotated

import typer

from s3_megatron.cli.output import console, errors, line, print_table, report
from s3_megatron.errors import S3Error

app = typer.Typer()
config_app = typer.Typer(help="What a recipe and a cluster come to.", no_args_is_help=True)
app.add_typer(config_app, name="config")

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="gpt2_tiny, gpt2_345m, gpt2_7b or another of configs/model, or a file's path."
    ),
]
OnCluster = Annotated[
    str,
    typer.Option(
        "--cluster", metavar="C", help="local, slurm, slurm_pyxis, slurm_apptainer, or the path of your own file."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, such as model.num_layers=12, optimizer=adamw or cluster.slurm.partition=spot; "
        "may be given again.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The run's name.", show_default="recipe, optimizer and time"),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name (s3-megatron runs) or its folder.")]


@config_app.command("show")
def show(recipe: Recipe, cluster: OnCluster = "local", settings: Settings = None) -> None:
    """Print every setting, the defaults included, and what follows from them."""
    from s3_megatron.jobs import compose
    from s3_megatron.jobs.catalog import as_yaml

    job = compose.load(recipe, cluster, settings or [])
    optimizer = job.recipe.optimizer
    line(as_yaml(job.recipe))
    line(f"# cluster {cluster}\n{as_yaml(job.cluster)}")
    line(f"# {job.ranks} ranks: {job.data_parallel} data-parallel copies of {job.model_parallel}")
    rule = ", by the paper's rule from the rates" if optimizer.weight_decay is None else ""
    line(f"# weight decay {optimizer.decay:g}{rule}")


@app.command()
def check(recipe: Recipe, cluster: OnCluster, settings: Settings = None) -> None:
    """Look for everything that would fail, before anything is queued; exit code 1 if something would."""
    from s3_megatron.jobs import checks, compose

    with errors.status("checking (Megatron's own parser takes seconds)"):
        found = checks.check(compose.load(recipe, cluster, settings or []))
    report(found.findings)
    line(f"{len(found.errors)} to mend, {len(found.warnings)} to consider")
    raise typer.Exit(1 if found.errors else 0)


@app.command()
def submit(
    recipe: Recipe,
    cluster: OnCluster,
    settings: Settings = None,
    name: Name = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; make and queue nothing.")] = False,
) -> None:
    """Check a recipe, write its sbatch script into a run folder, and queue it."""
    from s3_megatron.jobs import checks, compose
    from s3_megatron.jobs import submit as submission
    from s3_megatron.jobs.render import render

    job = compose.load(recipe, cluster, settings or [])
    if job.cluster.scheduler != "slurm":
        raise S3Error(f"cluster {cluster} has no scheduler: s3-megatron launch {recipe} --cluster {cluster}")
    path = submission.folder(job, name)
    script = render(job, path)
    if dry_run:
        print(script, end="")
        return
    with errors.status("checking (Megatron's own parser takes seconds)"):
        found = checks.check(job)
    if found.errors:
        report(found.findings)
        raise S3Error("nothing was submitted: mend the errors above")
    run = submission.submit(job, path)
    line(script)
    line(f"submitted {path.name} as job {', '.join(run.job_ids)}; everything about it is in {path}")
    line(f"  s3-megatron status {run.label}\n  s3-megatron logs {run.label} -f")


@app.command()
def launch(recipe: Recipe, cluster: OnCluster = "local", settings: Settings = None, name: Name = None) -> None:
    """Train a recipe here, on this machine's GPUs, or on its CPU (a rehearsal); run it to the end."""
    from s3_megatron.jobs import compose, runs
    from s3_megatron.jobs import submit as submission
    from s3_megatron.jobs.render import render

    job = compose.load(recipe, cluster, settings or [])
    if job.cluster.scheduler != "none":
        raise S3Error(f"cluster {cluster} has a scheduler: s3-megatron submit {recipe} --cluster {cluster}")
    job = submission.here(job)
    path = submission.folder(job, name)
    run = runs.create(job, path, render(job, path))
    line(f"training in {path}; after an interruption: s3-megatron resume {run.label}")
    raise typer.Exit(submission.start(run))


@app.command()
def rehearse(recipe: Recipe, cluster: OnCluster, settings: Settings = None) -> None:
    """Train a small model in the same layout on this machine's CPUs, kill a rank, and resume."""
    from s3_megatron.jobs import compose
    from s3_megatron.jobs.rehearse import rehearse as rehearsal

    rehearsal(compose.load(recipe, cluster, settings or []), Path("runs/rehearsal"), console)


@app.command()
def status(run: Annotated[str | None, typer.Argument(metavar="RUN", show_default="all")] = None) -> None:
    """Show how a run is: queue, iteration, loss, speed, checkpoint, restarts, and what failed first."""
    from s3_megatron.jobs import runs
    from s3_megatron.jobs import status as statuses

    if run is None:
        print_table(statuses.overview(runs.known_runs()))
    else:
        print_table(statuses.table(statuses.status(runs.find(run))))


@app.command("runs")
def runs_() -> None:
    """List the runs that were submitted or launched from here."""
    status()


@app.command()
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing what is added.")] = False,
) -> None:
    """Print a run's logs, those of the job and of every node, each line with where it is from."""
    from s3_megatron.jobs import logs as reading
    from s3_megatron.jobs import runs

    for text in reading.lines(runs.find(run), follow):
        print(text, flush=follow)


@app.command()
def cancel(run: RunName) -> None:
    """End a run now; `touch RUN/STOP` would have it save first."""
    from s3_megatron.jobs import runs
    from s3_megatron.jobs import submit as submission

    found = runs.find(run)
    line(f"cancelled job {', '.join(submission.cancel(found))}; s3-megatron resume {found.label} takes it up again")


@app.command()
def resume(run: RunName) -> None:
    """Let a run that was cancelled, has failed or was interrupted go on, with what its recipe.yaml says now."""
    from s3_megatron.jobs import runs
    from s3_megatron.jobs import submit as submission

    found = runs.find(run)
    code = submission.resume(found, line)
    if found.job.cluster.scheduler == "slurm":
        line(f"queued again as job {found.job_ids[-1]}")
    raise typer.Exit(code)
