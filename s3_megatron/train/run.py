"""Running any script with S3: ``torchrun ... -m s3_megatron.train.run [--rehearsal] SCRIPT ARGS...``."""

import importlib.util
import runpy
import sys
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.train.entry import RegisterWithDeepSpeed, one_line_errors, prepare

USAGE = "usage: python -m s3_megatron.train.run [--rehearsal] SCRIPT ARGS..."


def main() -> None:
    """Run ``sys.argv``'s script, unmodified, as python would, in a process where Megatron and DeepSpeed have S3."""
    argv = sys.argv[1:]
    rehearse = argv[:1] == ["--rehearsal"]
    script, *args = argv[rehearse:] or ["--help"]
    if script in ("-h", "--help"):
        print(USAGE)
        return
    with one_line_errors():
        if not Path(script).is_file():
            raise S3Error(
                f"{script} is not a file: give the path of a training script, such as pretrain_gpt.py; {USAGE}"
            )
        if not sys.flags.safe_path:
            sys.path[0] = str(Path(script).resolve().parent)
        sys.meta_path.insert(0, RegisterWithDeepSpeed())
        # A script for DeepSpeed alone need not have Megatron; one for Megatron may bring it in its own folder.
        if rehearse or importlib.util.find_spec("megatron") is not None:
            args = prepare(args, rehearse)
        sys.argv = [script, *args]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
