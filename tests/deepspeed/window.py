"""What the checks leave out on the oldest DeepSpeed of the window, and why; imports no DeepSpeed."""

from importlib.metadata import version

OLD = version("deepspeed").startswith("0.17.")

ZERO_OF_16_BIT = (1, 2, 3) if OLD else (0, 1, 2, 3)  # refused at stage 0 of 0.17.6: limits.py says why

# By check: why it does not run here.
NOT_ON_THIS = (
    {"check_16_bit_masters_and_states": "DeepSpeed 0.17.6 knows neither bf16_master_weights_and_grads nor its states"}
    if OLD
    else {}
)
