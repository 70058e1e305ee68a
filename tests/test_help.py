"""``--help`` of everything that a person or a script starts: it is what our errors send them to."""

import re
import subprocess
import sys

import pytest
import typer

from s3_megatron import cli
from tests.launcher import ROOT, settings
from tests.ranks import ranks

# What imports Megatron, which takes seconds, in a forked rank that has it; the others are a Python of their own.
WITH_MEGATRON = {
    "s3_megatron.train.pretrain_gpt": ["--rehearsal"],
    "s3_megatron.train.pretrain_gpt_deepspeed": ["--rehearsal"],
    "s3_megatron.jobs.node.allreduce": [],
}
ALONE = ["s3_megatron.demo", "s3_megatron.jobs.node", "s3_megatron.jobs.node.health", "s3_megatron.jobs.node.torchrun"]
VISIT = ["benchmarks.gpu", "benchmarks.gpu.training", "benchmarks.gpu.variants"]


@pytest.mark.distributed
@pytest.mark.parametrize("module", WITH_MEGATRON)
def test_an_entry_shows_its_flags(module: str) -> None:
    """A bare % in one of Megatron's own texts ended pretrain_gpt --help in "unsupported format character"."""
    shown = ranks(["-m", module, *WITH_MEGATRON[module], "--help"], nproc=1, timeout=120)
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert "usage: " in shown.stdout and "Traceback" not in shown.stderr
    if module.startswith("s3_megatron.train.pretrain_gpt"):
        assert "--moe-paged-stash-buffer-size-factor-cuda" in shown.stdout and "--s3-beta" in shown.stdout
        assert "(default: %(default)s)" not in shown.stdout, "texts that can be filled in are"


@pytest.mark.slow
@pytest.mark.parametrize("module", [*ALONE, *VISIT])
def test_a_program_shows_its_flags(module: str) -> None:
    """A benchmark that docs/kernels.md named took a function that had another name by then."""
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, cwd=ROOT, env=settings(None), capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "usage: " in shown.stdout, shown.stdout[-1000:] + shown.stderr[-3000:]


def test_every_command_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    def walk(command: object, words: list[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            root(args=[*words, "--help"], prog_name="s3-megatron")
        assert stop.value.code == 0
        assert re.search(r"Usage: .*s3-megatron", capsys.readouterr().out)
        for name, below in getattr(command, "commands", {}).items():
            walk(below, [*words, name])

    root = typer.main.get_command(cli.app)
    walk(root, [])
