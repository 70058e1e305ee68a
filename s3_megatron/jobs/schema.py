"""What every setting of a recipe or a cluster has in common."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a YAML file: unknown keys are refused, and nothing changes after it has been read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has a line break or another control character: these end a line of a job script")
    return text


def valid_name(text: str) -> bool:
    """Whether ``text`` can name a job, a file or a variable in places where nothing can be quoted."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text) is not None


def _name(text: str) -> str:
    if not valid_name(text):
        raise ValueError("must be letters, digits, '.', '_' and '-', and begin with a letter, digit or '_'")
    return text


Text = Annotated[str, AfterValidator(_one_line)]
Name = Annotated[str, AfterValidator(_name)]
