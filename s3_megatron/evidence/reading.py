"""The files of experiments, and their YAML: a key that is given twice is refused, and 1e-3 is a number. No torch."""

import re
from pathlib import Path
from typing import Any

import yaml

from s3_megatron.errors import S3Error

# Through the link to the project's configs/ that jobs has, so that a wheel brings them along.
CONFIGS = Path(__file__).parents[1] / "jobs" / "configs" / "experiments"


class _Loader(yaml.SafeLoader):
    """PyYAML's reader of plain data; that keeps the last of equal keys, and takes 1e-3, without a point, for text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that the mapping has already; what ``<<`` brings in comes later, and may be overruled."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(content: str) -> Any:
    """Read YAML; raises yaml.YAMLError where it is none, or gives a key twice."""
    return yaml.load(content, Loader=_Loader)


def source(name: str) -> Path:
    """The file of an experiment, by its name under configs/experiments, or by its path."""
    return Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"


def read(name: str) -> dict[str, Any]:
    """Read an experiment's file, by its name under configs/experiments, or by its path.

    Raises:
        S3Error: there is none, or it is no mapping of settings in YAML.
    """
    path = source(name)
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise S3Error(f"there is no experiment {name!r}: give a file's path or one of {known}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise S3Error(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise S3Error(f"{path.name}: it must be a mapping of settings")
    return content
