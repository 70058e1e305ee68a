"""YAML as experiments are written: a key that is given twice is refused, and 1e-3 is a number."""

import re
from typing import Any

import yaml


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
