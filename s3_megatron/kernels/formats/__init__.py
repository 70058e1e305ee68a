"""How states are stored: the seam at which another format enters, as one more object of ``FORMATS``.

foreach and the optimizers know formats by these objects alone. A compiled kernel has a pair of functions that read and
write m and r (``load_states`` and ``store_states``, in cpu/formats.h and triton/kernel.py), and takes the formats that
these know (op.py); the others go to foreach.
"""

import torch

from s3_megatron.kernels.formats.dtype import Dtype
from s3_megatron.kernels.formats.format import Format

__all__ = ["FORMATS", "PLAIN", "Format", "find"]

PLAIN = {dtype: Dtype(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
FORMATS: dict[str, Format] = {each.name: each for each in PLAIN.values()}


def find(name: str, dtypes: list[torch.dtype]) -> Format | None:
    """Return the format of states found in these dtypes: the one asked for, or a plain one that an engine put there.

    None where they are stored in no way that is known.
    """
    asked = FORMATS[name]
    if [*asked.columns.values()][: len(dtypes)] == dtypes:
        return asked
    return PLAIN.get(dtypes[0]) if dtypes.count(dtypes[0]) == len(dtypes) else None
