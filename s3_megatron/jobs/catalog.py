"""The YAML and JSON files that come with the package, and how settings are written down."""

import difflib
import os
from pathlib import Path

import yaml
from pydantic import BaseModel

from s3_megatron.errors import S3Error

CONFIGS = Path(__file__).parent / "configs"  # a link to the project's configs/, so that a wheel brings it along


def names(kind: str) -> list[str]:
    """The names of the files in ``configs/KIND``."""
    return sorted(path.stem for path in (CONFIGS / kind).iterdir())


def find(kind: str, name: str, suffix: str = ".yaml") -> Path:
    """The file that ``name``, a path or a name under ``configs/KIND``, means; raises S3Error where there is none."""
    if os.sep in name or name.endswith(suffix):
        if not Path(name).is_file():
            raise S3Error(f"{name} is not a file: give the path of one, or one of {', '.join(names(kind))}")
        return Path(name)
    path = CONFIGS / kind / f"{name}{suffix}"
    if not path.is_file():
        close = difflib.get_close_matches(name, names(kind), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise S3Error(f"there is no {kind} {name!r}: give a file's path or one of {', '.join(names(kind))}{hint}")
    return path


def as_yaml(model: BaseModel) -> str:
    """Every setting of ``model``, the defaults included."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
