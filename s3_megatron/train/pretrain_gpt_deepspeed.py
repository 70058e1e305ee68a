"""Pretraining GPT with S3 on DeepSpeed, as pretrain_gpt does on Megatron's distributed optimizer.

``torchrun ... -m s3_megatron.train.pretrain_gpt_deepspeed [--rehearsal] --deepspeed-config FILE <Megatron flags>``
"""

import sys

from s3_megatron.train.entry import one_line_errors, prepare


def main() -> None:
    """Train as ``sys.argv`` says."""
    argv = [arg for arg in sys.argv[1:] if arg != "--rehearsal"]
    with one_line_errors():
        sys.argv[1:] = prepare(argv, rehearse="--rehearsal" in sys.argv)
        from s3_megatron.train import deepspeed_loop  # imports Megatron, which must see what prepare() did

        deepspeed_loop.train()


if __name__ == "__main__":
    main()
