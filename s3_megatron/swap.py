"""Replacing symbols of a host, loudly and reversibly."""

from collections.abc import Callable, Sequence
from typing import Any

from s3_megatron.errors import S3Error


class SymbolSwap:
    """Replaces attributes of a host's modules, classes and objects, and puts them back."""

    def __init__(self, host: str) -> None:
        """Remember ``host``, the name and version that an error message shows."""
        self._host = host
        self._undo: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Set ``owner.name`` to ``make(original)``.

        Raises:
            S3Error: the host has no such symbol any more; what was replaced before is put back first.
        """
        if not hasattr(owner, name):
            self.undo()
            where = getattr(owner, "__name__", type(owner).__name__)
            raise S3Error(
                f"{self._host} has no {where}.{name}, which s3_megatron replaces: install a version from "
                "the table in docs/versions.md, or report this one"
            )
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._undo.append((owner, name, original))

    def replace_in(self, owners: Sequence[Any], name: str, make: Callable[[Any], Any]) -> None:
        """Replace one function that several modules hold as ``name``: where they hold the same, one wrapper serves all.

        Raises:
            S3Error: as ``replace``.
        """
        made: dict[Any, Any] = {}

        def make_once(original: Any) -> Any:
            if original not in made:
                made[original] = make(original)
            return made[original]

        for owner in owners:
            self.replace(owner, name, make_once)

    def undo(self) -> None:
        """Put every original back, the last replaced first."""
        while self._undo:
            owner, name, original = self._undo.pop()
            setattr(owner, name, original)

    @property
    def active(self) -> bool:
        """Whether anything is replaced."""
        return bool(self._undo)
