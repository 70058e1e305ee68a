"""The result of one look at a node."""

from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was seen; "bad" is this node's fault, "shared" the shared storage's."""

    name: str
    state: Literal["ok", "not checked", "bad", "shared"]
    text: str

    @classmethod
    def good(cls, name: str, text: str) -> Self:
        """Tell of something that is as it should be."""
        return cls(name, "ok", text)

    @classmethod
    def unknown(cls, name: str, text: str) -> Self:
        """Tell of something that cannot be read here, which does not make it good."""
        return cls(name, "not checked", text)

    @classmethod
    def bad(cls, name: str, text: str) -> Self:
        """Tell of something for which the job should go without this node."""
        return cls(name, "bad", text)

    @classmethod
    def shared(cls, name: str, text: str) -> Self:
        """Tell of something that is wrong on every node alike."""
        return cls(name, "shared", text)
