"""Several training runs in one launch, one after the other: a rank's imports take longer than a tiny run.

``torchrun ... -m tests.trainings JOBS.json`` is what ``train_all`` starts. The process group stays; the rest of
Megatron's global state is made anew for every run, by the function that its own tests use.
"""

import functools
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from s3_megatron.train.entry import prepare
from tests.engines.megatron.gpt import HAS_ENTRY, SCRIPT
from tests.ranks import ranks

# "megatron", "deepspeed", or "frozen" (Megatron with all but the last norm and the output layer frozen), and the
# entry's flags.
Job = tuple[str, list[str]]


def train_all(jobs: Sequence[Job], nproc: int, folder: Path) -> None:
    """Train one job after the other on ``nproc`` ranks."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = ranks(["-m", "tests.trainings", str(folder / "jobs.json")], nproc=nproc, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@contextmanager
def frozen() -> Iterator[None]:
    """Build models whose embedding and layers are not trained: the first of two stages has nothing to train."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    build = GPTModel.__init__

    def freeze(self: GPTModel, *args: Any, **more: Any) -> None:
        build(self, *args, **more)
        for name, param in self.named_parameters():
            param.requires_grad_(name.startswith(("decoder.final_layernorm", "output_layer")))

    GPTModel.__init__ = freeze
    try:
        yield
    finally:
        GPTModel.__init__ = build


def main() -> None:
    for engine, argv in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [engine, *prepare(argv, rehearse=True)]
        from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset  # not before prepare()
        from megatron.training.training import destroy_global_state

        MockGPTLowLevelDataset.size = 200  # of 100,000 documents every run shuffles an index: a fifth of its time
        if engine == "deepspeed":
            from s3_megatron.train.deepspeed_loop import train
        elif HAS_ENTRY:
            from s3_megatron.train.gpt import train
        else:
            sys.path[0] = str(SCRIPT.parent)  # as python does for a script
            train = functools.partial(runpy.run_path, str(SCRIPT), run_name="__main__")
        with frozen() if engine == "frozen" else nullcontext():
            train()
        destroy_global_state()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
