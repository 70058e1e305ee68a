"""What the checks leave out on the oldest DeepSpeed of the window, and why; imports no DeepSpeed."""

from importlib.metadata import version

OLD = version("deepspeed").startswith("0.17.")

ZERO_OF_16_BIT = (1, 2, 3) if OLD else (0, 1, 2, 3)  # refused at stage 0 of 0.17.6: see limits.py
