"""``python -m s3_megatron.cli``."""

from s3_megatron.cli import main

if __name__ == "__main__":
    main()
