"""Values of a mapping whose keys are tensors: a tensor's hash is a function of Python's, which takes .2 us a key."""

from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import Tensor


class Lookup:
    """The values as they are now; lists of keys in the mapping's order, as an optimizer's groups are, come cheapest."""

    def __init__(self, mapping: Mapping[Tensor, Any]) -> None:
        self._keys, self._values = list(mapping), list(mapping.values())
        self._next = 0
        self._by_id: dict[int, Any] = {}

    def of(self, keys: list[Tensor]) -> list[Any]:
        """Return the value of each key, None where there is none."""
        begin, self._next = self._next, self._next + len(keys)
        if self._next <= len(self._keys) and all(map(is_, keys, self._keys[begin : self._next])):
            return list(self._values[begin : self._next])
        if not self._by_id:
            self._by_id = dict(zip(map(id, self._keys), self._values, strict=True))
        return [self._by_id.get(id(key)) for key in keys]
