"""What ranks really keep: each job of JOBS.json trains, and its first forward pass counts the bytes it saves.

``torchrun ... tests/jobs/measure.py JOBS.json`` is what ``test_memory`` starts. Every rank writes SAVED, a number of
bytes, into the job's run folder.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s3_megatron.train.entry import prepare


def main() -> None:
    for engine, run, argv in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [engine, *prepare(argv, rehearse=True)]
        from s3_megatron.train import gpt

        forward_step, saved = gpt.forward_step, dict[int, int]()

        def measured(
            data_iterator: Any, model: Any, forward_step: Any = forward_step, saved: dict[int, int] = saved
        ) -> Any:
            if saved or not model.training:
                return forward_step(data_iterator, model)
            weights = {param.untyped_storage().data_ptr() for param in model.parameters()}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()  # alive until the backward pass, so its address is its name
                if storage.data_ptr() not in weights:
                    saved[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward_step(data_iterator, model)

        gpt.forward_step = measured
        try:
            if engine == "deepspeed":
                from s3_megatron.train.deepspeed_loop import train

                train()
            else:
                gpt.train()
        finally:
            gpt.forward_step = forward_step
        (Path(run) / f"SAVED{os.environ['RANK']}").write_text(str(sum(saved.values())))
        from megatron.training.training import destroy_global_state

        destroy_global_state()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
