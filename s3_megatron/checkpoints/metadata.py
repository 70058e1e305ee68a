"""Reading the ``.metadata`` of torch.distributed.checkpoint without running what is in it: it is a pickle."""

import pickle
from pathlib import Path
from typing import Any


class _Inert:
    """What every class and function of the pickle becomes: it keeps its state, and does nothing."""

    state: Any = None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _value: Any) -> None:
        """Take an item of a list's subclass, and forget it."""

    extend = append


class _Reader(pickle.Unpickler):
    """An unpickler that imports nothing and calls nothing."""

    def find_class(self, _module: str, _name: str) -> type[_Inert]:
        return _Inert


def stored_files(path: Path) -> dict[str, int]:
    """The files that the checkpoint of ``path``, a ``.metadata``, consists of, and the least size of each in bytes.

    Read as torch 2.13 writes it (Metadata.storage_data, of _StorageInfo: relative_path, offset, length), which
    Megatron's torch_dist (0.17.1 to 0.19.2) and FSDP2's checkpoints are, too.

    Raises:
        ValueError: it is no such file, or torn.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            stored = _Reader(file).load().state["storage_data"].values()
            parts = [(part.state["relative_path"], part.state["offset"] + part.state["length"]) for part in stored]
        except OSError:
            raise
        except Exception as error:  # a torn or foreign pickle raises almost anything
            raise ValueError(f"{path.name} is torn: {error}") from error
    sizes: dict[str, int] = {}
    for name, end in parts:
        sizes[name] = max(end, sizes.get(name, 0))
    return sizes
