"""Several training runs in one launch, one after the other: a rank's imports take longer than a tiny run.

``torchrun ... -m tests.trainings JOBS.json`` is what ``train_all`` starts. The process group stays; the rest of
Megatron's global state is made anew for every run, by the function that its own tests use.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from s3_megatron.train.entry import prepare
from tests.launcher import torchrun

Job = tuple[str, list[str]]  # "megatron" or "deepspeed", and the entry's flags


def train_all(jobs: Sequence[Job], nproc: int, folder: Path) -> None:
    """Train one job after the other on ``nproc`` ranks."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(["-m", "tests.trainings", str(folder / "jobs.json")], nproc=nproc, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def main() -> None:
    for engine, argv in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [engine, *prepare(argv, rehearse=True)]
        if engine == "deepspeed":
            from s3_megatron.train.deepspeed_loop import train
        else:
            from s3_megatron.train.gpt import train
        train()
        from megatron.training.training import destroy_global_state  # not before prepare()

        destroy_global_state()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
