"""Run folders of the tiny recipe."""

from pathlib import Path

from s3_megatron.jobs import compose, runs, submit
from s3_megatron.jobs.render import render
from s3_megatron.jobs.runs import Run


def make(folder: Path, name: str = "first", *settings: str) -> Run:
    job = submit.here(compose.load("gpt2_tiny", "local", [f"cluster.runs_dir={folder}/runs", *settings]))
    path = submit.folder(job, name)
    return runs.create(job, path, render(job, path))
