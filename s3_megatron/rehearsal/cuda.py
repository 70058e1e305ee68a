"""What torch.cuda answers in a rehearsal: one device, made of the CPU, on which everything is already done."""

import contextlib
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Stream:
    """A stream on which work has finished as soon as it is queued."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take and ignore torch.cuda.Stream's arguments."""

    def _done(self, *args: Any, **kwargs: Any) -> None:
        """Return at once."""

    wait_stream = wait_event = synchronize = _done

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record ``event``, or a new one."""
        event = event or Event()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Give torch.cuda.Stream.priority_range's pair: one priority only."""
        return 0, 0


class Event:
    """An event that has happened when it is recorded; ``elapsed_time`` is the host's clock, in milliseconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take and ignore torch.cuda.Event's arguments."""
        self._at = time.perf_counter()

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self._at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that the event has happened."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Measure the milliseconds between this event and ``end``."""
        return (end._at - self._at) * 1e3


_STREAM = Stream()
# Megatron asks GPUs before Blackwell (10.0) for environment variables about CUDA queues, which mean nothing here.
_CAPABILITY = (10, 0)
_PROPERTIES = SimpleNamespace(
    name="CPU (rehearsal)",
    major=_CAPABILITY[0],
    minor=_CAPABILITY[1],
    total_memory=0,
    multi_processor_count=1,
    warp_size=32,
)


# torch.cuda's names (torch 2.13) and what stands in for them. Its random functions (manual_seed, get_rng_state, ...)
# need no stand-in: they go through is_initialized, current_device, device_count and default_generators, so a GPU's
# generator is the CPU's here.
STAND_INS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "default_generators": (torch.default_generator,),
    # A function each: torch.compile has rules by function, and refuses one that stands for two names.
    "set_device": lambda *args, **kwargs: None,
    "synchronize": lambda *args, **kwargs: None,
    "empty_cache": lambda *args, **kwargs: None,
    "reset_peak_memory_stats": lambda *args, **kwargs: None,
    "memory_stats": lambda *args, **kwargs: defaultdict(int),
    "get_device_capability": lambda *args: _CAPABILITY,
    "get_device_properties": lambda *args: _PROPERTIES,
    "get_device_name": lambda *args: _PROPERTIES.name,
    "is_current_stream_capturing": lambda: False,
    "current_stream": lambda *args: _STREAM,
    "default_stream": lambda *args: _STREAM,
    "set_stream": lambda *args, **kwargs: None,
    "stream": lambda *args: contextlib.nullcontext(),
    "Stream": Stream,
    "Event": Event,
}

# torch.cuda's own modules that hold some of these names themselves.
BOUND_BY_NAME = {
    torch.cuda.random: ("is_initialized", "current_device", "device_count"),
    torch.cuda.memory: ("memory_stats",),
}


def _on_cpu(device: Any) -> Any:
    """Turn a CUDA device, however it is written, into the CPU; leave the rest alone."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    if isinstance(device, (str, torch.device)) and str(device).startswith("cuda"):
        return torch.device("cpu")
    return device


class CudaIsCpu(TorchFunctionMode):
    """While active, CUDA devices given to torch functions mean the CPU, and CPU tensors have CUDA type names."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call ``func`` with CUDA devices and pinned memory taken out of its arguments."""
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron sorts parameters by 'torch.cuda.BFloat16Tensor' and its kin.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        if kwargs:
            kwargs = dict(kwargs)
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
        return func(*args, **kwargs or {})
