"""What the kernel's tests step: sizes, dtypes, and settings that change while a graph is replayed."""

import torch

from tests.gpu.card import DEVICE, REAL

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = (0, 1, 15, 16, 17, 1025, *((4097, 1_000_003) if REAL else ()))
ALL_F32 = {"param": F32, "grad": F32, "state": F32, "device": DEVICE}
ENGINE = {"param": F32, "grad": BF16, "state": BF16, "model": BF16, "device": DEVICE}


def on_device(value, dtype=torch.float32):
    return torch.tensor([value], dtype=dtype, device=DEVICE)


def changing_settings():
    return {
        "lr": torch.tensor(0.125, device=DEVICE),
        "scale": on_device(1.0),
        "found_inf": on_device(0.0),
        "statistics": torch.zeros(5, dtype=torch.float64, device=DEVICE),
        "rounding_seed": on_device(1, torch.int64),
    }
