"""Several training runs in one launch, one after the other: a rank's imports take longer than a tiny run.

``torchrun ... -m tests.trainings JOBS.json`` is what ``train_all`` starts. The process group stays; the rest of
Megatron's global state is made anew for every run, by the function that its own tests use.
"""

import functools
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from s3_megatron.train.entry import prepare
from tests.megatron.gpt import HAS_ENTRY, SCRIPT
from tests.ranks import ranks

Job = tuple[str, list[str]]  # "megatron" or "deepspeed", and the entry's flags


def train_all(jobs: Sequence[Job], nproc: int, folder: Path) -> None:
    """Train one job after the other on ``nproc`` ranks."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = ranks(["-m", "tests.trainings", str(folder / "jobs.json")], nproc=nproc, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def main() -> None:
    for engine, argv in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [engine, *prepare(argv, rehearse=True)]
        if engine == "deepspeed":
            from s3_megatron.train.deepspeed_loop import train
        elif HAS_ENTRY:
            from s3_megatron.train.gpt import train
        else:
            sys.path.insert(0, str(SCRIPT.parent))
            train = functools.partial(runpy.run_path, str(SCRIPT), run_name="__main__")
        train()
        from megatron.training.training import destroy_global_state  # not before prepare()

        destroy_global_state()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
