"""Pretraining GPT with S3: ``torchrun ... -m s3_megatron.train.pretrain_gpt [--rehearsal] <Megatron flags>``."""

import sys

from s3_megatron.train.entry import one_line_errors, prepare


def main() -> None:
    """Train as ``sys.argv`` says."""
    argv = [arg for arg in sys.argv[1:] if arg != "--rehearsal"]
    with one_line_errors():
        sys.argv[1:] = prepare(argv, rehearse="--rehearsal" in sys.argv)
        from s3_megatron.train import gpt  # imports Megatron, which must see what prepare() did

        gpt.train()


if __name__ == "__main__":
    main()
