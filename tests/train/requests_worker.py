"""Trains with both engines in one launch: ``STOP`` ends the first run of each, the second comes to its end.

``SAVE`` is there, too, and cannot be removed.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from s3_megatron.train.entry import prepare
from tests.train.tiny import FLAGS, MOCK

FLAGS_OF_RUN = ["--ckpt-format", "torch_dist", "--train-iters", "6", "--save-interval", "4"]


def main() -> None:
    folder = Path(sys.argv[1])
    sys.argv = prepare(["worker"], rehearse=True)
    from megatron.training.training import checkpoint_and_decide_exit, destroy_global_state

    from s3_megatron.train import deepspeed_loop, gpt

    (folder / "zero.json").write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}))
    for engine, train in (("megatron", gpt.train), ("deepspeed", deepspeed_loop.train)):
        run = folder / engine
        os.environ["S3_RUN_DIR"] = str(run)
        checkpoints = ["--save", str(run / "checkpoints"), "--load", str(run / "checkpoints")]
        flags = [*FLAGS, *MOCK, *FLAGS_OF_RUN, *checkpoints]
        if engine == "deepspeed":
            flags = [flag for flag in flags if flag != "--use-distributed-optimizer"]
            flags += ["--deepspeed-config", str(folder / "zero.json")]
        if dist.get_rank() == 0 if dist.is_initialized() else os.environ["RANK"] == "0":
            run.mkdir(exist_ok=True)
            (run / "STOP").touch()
            (run / "SAVE").mkdir()  # a request that cannot be removed, as another user's
        for _ in range(2):
            sys.argv = [engine, *prepare(flags, rehearse=True)]
            try:
                train()
                print(f"{engine} returned", flush=True)
            except SystemExit as stop:
                assert not (run / "FINISHED").exists(), "an early end"
                print(f"{engine} exits with {stop.code}", flush=True)
            destroy_global_state()
            dist.barrier()
    import megatron.training.training as host

    assert host.checkpoint_and_decide_exit is checkpoint_and_decide_exit, "put back"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
