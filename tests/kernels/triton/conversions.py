"""Rounding in Triton's interpreter, as a compiled kernel does it."""

import pytest
import torch
from triton.runtime import interpreter

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def exact_conversions(monkeypatch):
    """The interpreter of Triton 3.7.1 truncates to bfloat16 and mangles its denormals; the compiled kernel rounds to
    nearest even (test_compiled.py)."""

    def convert(data, source, target, rounding_mode):
        integers = {16: torch.int16, 32: torch.int32}
        bits = torch.from_numpy(data.view(f"int{source.primitive_bitwidth}").copy())
        value = bits.view(_TORCH[source.name]).to(_TORCH[target.name])
        return value.view(integers[target.primitive_bitwidth]).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
