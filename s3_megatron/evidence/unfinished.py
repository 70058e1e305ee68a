"""Stacks that were stopped in the middle: each is kept in a file, and goes on from it to the bit."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.files import write_file

FOLDER = "unfinished"  # beside cells.jsonl

# A stack's file, and by what it must have been begun to go on: cells, code, torch and processor.
type Kept = tuple[Path, list[str]]


def write(kept: Kept, optimizers: Sequence[torch.optim.Optimizer], tensors: Sequence[Tensor], **rest: Any) -> None:
    """Keep a stack: its optimizers, what changes in place, and the rest.

    Raises:
        S3Error: the disk is full, or gone.
    """
    states = [optimizer.state_dict() for optimizer in optimizers]
    content = {"by": kept[1], "optimizers": states, "tensors": [t.detach() for t in tensors], **rest}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(kept[0], buffer.getvalue())


def read(
    kept: Kept, device: str, optimizers: Sequence[torch.optim.Optimizer], tensors: Sequence[Tensor]
) -> dict[str, Any] | None:
    """Load ``optimizers`` and ``tensors`` (modified) from a stack's file; returns the rest.

    None, and nothing is changed, where there is no file, or it was begun by something else.

    Raises:
        S3Error: the file is damaged.
    """
    try:
        content: dict[str, Any] = torch.load(kept[0], device, weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = [*str(error).splitlines(), "it ends too early"][0]
        raise S3Error(f"{kept[0]} cannot be read: {reason}; remove it, and its run begins anew") from None
    if content["by"] != kept[1]:
        return None
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for tensor, value in zip(tensors, content["tensors"], strict=True):
        tensor.data.copy_(value)
    return content
