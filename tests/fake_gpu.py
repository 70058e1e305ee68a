"""A GPU that is not there: tensors on "cuda" without values, on which whatever would make the host wait is an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _RefuseToWait(TorchDispatchMode):
    """Raises at a copy between host and GPU that blocks; reading a value is refused by the fake tensors themselves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES and not (kwargs.get("non_blocking") or any(x is True for x in args)):
            devices = {x.device.type for x in args if isinstance(x, Tensor)}
            if kwargs.get("device") is not None:
                devices.add(torch.device(kwargs["device"]).type)
            if devices == {"cpu", "cuda"}:
                raise AssertionError(f"the host waits for the GPU: {func} between {sorted(devices)}")
        return func(*args, **kwargs)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Let ``device="cuda"`` work here; reading a value raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def never_waiting() -> TorchDispatchMode:
    """On a fake GPU, raise where ``torch.cuda.set_sync_debug_mode("error")`` would.

    Not seen: what C++ does below the dispatcher, as ``torch.tensor`` of a list of GPU tensors.
    """
    return _RefuseToWait()
