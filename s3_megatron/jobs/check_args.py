"""A job's flags before it is queued: Megatron's own parser and validation, and DeepSpeed's schema, in one process.

``python -m s3_megatron.jobs.check_args`` reads ``{"entry", "argv", "world_size", "rehearse"}`` as JSON from standard
input and prints one line, ``{"error": ..., "left_out": [...]}``, behind MARK. No process group, no file written.
"""

import importlib.util
import json
import os
import sys

from s3_megatron.errors import S3Error

MARK = "s3_megatron check_args: "


def check(entry: str, argv: list[str], rehearse: bool, left_out: list[str]) -> None:
    """Parse and validate ``argv`` as ``entry`` ("megatron" or "deepspeed") does; adds to ``left_out`` what it cannot.

    Raises:
        S3Error: Megatron, DeepSpeed or the entry refuses the flags.
    """
    if not rehearse and _stand_in_for_cuda():
        left_out.append("no GPU here: checked on the rehearsal's stand-in for one")
    if not rehearse and importlib.util.find_spec("transformer_engine") is None and "local" not in argv:
        left_out.append("no Transformer Engine here: what it demands itself is not known")
    from s3_megatron.train.entry import prepare

    sys.argv = [entry, *prepare(argv, rehearse)]
    if entry == "deepspeed":
        _parse_deepspeed()
    else:
        from s3_megatron.train import gpt

        gpt.configure(gpt.parse())


def _stand_in_for_cuda() -> bool:
    """Let validation ask for a GPU's properties where there is none; the flags stay those of the GPU."""
    import torch

    if torch.cuda.is_available():
        return False
    from s3_megatron import rehearsal

    os.environ["DS_ACCELERATOR"] = "cpu"
    rehearsal.activate()
    return True


def _parse_deepspeed() -> None:
    from s3_megatron.train import gpt
    from s3_megatron.train.deepspeed_config import DeepSpeedFlags

    flags = DeepSpeedFlags(sys.argv[1:])
    args = gpt.parse(flags.add, flags.check)
    config = flags.complete(args)
    gpt.configure(args)
    from deepspeed.runtime.config import DeepSpeedConfig

    # Without a process group it takes the world for one rank; complete() has made the three sizes agree.
    sizes = ("train_batch_size", "gradient_accumulation_steps")
    DeepSpeedConfig({key: value for key, value in config.items() if key not in sizes})


def main() -> None:
    """Check what standard input says."""
    job = json.load(sys.stdin)
    # No such rank: it opens no writers, which the last one does, and prints nothing, which the first one does.
    world = str(job["world_size"])
    os.environ.update(RANK=world, WORLD_SIZE=world, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    error: str | None = None
    left_out: list[str] = []
    try:
        check(job["entry"], job["argv"], job["rehearse"], left_out)
    except S3Error as refusal:
        error = str(refusal)
    except Exception as refusal:  # Megatron refuses by assertions, and by whatever a wrong value runs into
        error = " ".join(str(refusal).split()) or type(refusal).__name__
        if not isinstance(refusal, AssertionError | ValueError):
            error = f"{type(refusal).__name__}: {error}"
    print(f"\n{MARK}{json.dumps({'error': error, 'left_out': left_out})}", flush=True)


if __name__ == "__main__":
    main()
