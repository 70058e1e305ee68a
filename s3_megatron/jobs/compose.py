"""From YAML files and ``--set`` to a checked job."""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from s3_megatron.errors import S3Error
from s3_megatron.jobs.catalog import CONFIGS, find
from s3_megatron.jobs.cluster import Cluster
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.node.gpus import least_memory
from s3_megatron.jobs.recipe import OPTIMIZERS, Recipe

# What pydantic says in Python's words.
_IN_YAML = {
    "string_type": "must be text: write it in quotes",  # YAML has read yes, no, on or off
    "tuple_type": "must be a list, as in [a, b]",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
}


def load(recipe: str, cluster: str, settings: Sequence[str] = ()) -> Job:
    """Read a recipe and a cluster, each the path of a YAML file or a name under ``configs``.

    ``settings`` are "model.num_layers=12" for the recipe and "cluster.slurm.partition=spot" for the cluster; the last
    one counts. Without a scheduler the job has one node, and ``accelerator: auto`` becomes what this machine has.

    Raises:
        S3Error: a file is not there or is no YAML, or keys or values are wrong; it names all of them.
    """
    ours, theirs = _split(settings)
    job = Job(_recipe(recipe, ours), Cluster.model_validate(_here(_cluster(cluster, theirs))))
    if job.cluster.scheduler == "none" and job.recipe.layout.nodes > 1:
        layout = job.recipe.layout.model_copy(update={"nodes": 1})
        return Job(job.recipe.model_copy(update={"layout": layout}), job.cluster)
    return job


def _split(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals or not key:
            raise S3Error(
                f"--set {setting} must be KEY=VALUE, such as model.num_layers=12 or cluster.slurm.account=abc"
            )
    prefix = "cluster."
    return (
        [setting for setting in settings if not setting.startswith(prefix)],
        [setting.removeprefix(prefix) for setting in settings if setting.startswith(prefix)],
    )


def _recipe(name: str, settings: list[str]) -> Recipe:
    path = find("model", name)
    chosen = [value for key, _, value in (setting.partition("=") for setting in settings) if key == "optimizer"]
    others = [setting for setting in settings if not setting.startswith("optimizer=")]
    source = _source(path, settings)

    def merged(as_written: bool) -> dict[str, Any]:
        raw = _read(path, as_written)
        optimizer = chosen[-1] if chosen else raw.get("optimizer")
        if isinstance(optimizer, str):
            raw["optimizer"] = _read(find("optimizer", optimizer), as_written)
        return _merged(source, raw, others, as_written)

    return _validated(Recipe, merged, source)


def _cluster(name: str, settings: list[str]) -> Cluster:
    path = find("cluster", name)
    source = _source(path, settings, "cluster.")
    return _validated(
        Cluster, lambda as_written: _merged(source, _read(path, as_written), settings, as_written), source
    )


def _source(path: Path, settings: list[str], prefix: str = "") -> str:
    """What an error is of: ``path``, and the keys that were set beside it. A value may be a secret."""
    keys = " ".join(prefix + setting.partition("=")[0] for setting in settings)
    return f"{path} with --set {keys}" if keys else str(path)


def _here(cluster: Cluster) -> dict[str, Any]:
    """Settle ``accelerator: auto``, by the GPUs' device files: asking torch would take seconds.

    The GPUs' own memory then counts, where the file says none.
    """
    resolved = cluster.model_dump()
    if cluster.accelerator == "auto":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if hidden is None else len(hidden.split(",")) * bool(hidden)
        resolved["accelerator"] = "gpu" if gpus else "cpu"
        resolved["ranks_per_node"] = gpus or resolved["ranks_per_node"]
        if gpus and "memory_gib" not in cluster.gpu.model_fields_set and (memory := least_memory()):
            resolved["gpu"]["memory_gib"] = memory
    return resolved


def _read(path: Path, as_written: bool) -> DictConfig:
    """Read a YAML file; ``as_written`` leaves every value the text that stands there, 007 and 1e-3 included."""
    try:
        config = OmegaConf.create(_as_written(path.read_bytes())) if as_written else OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise S3Error(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise S3Error(f"{path} must be a mapping of keys to values, as those of {CONFIGS} are")
    return config


def _as_written(text: str | bytes) -> Any:
    # libyaml's, where PyYAML has it, is the faster: every file is read in both ways, and `runs` reads two a run.
    return yaml.load(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, as OmegaConf does; PyYAML takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"found duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_plain[M: BaseModel](model: type[M], path: Path) -> M:
    """Read a file that ``as_yaml`` wrote, and a person may have edited: nothing in it refers to anything else.

    Raises:
        S3Error: it is not there or is no YAML, or keys or values are wrong; it names all of them.
    """
    try:
        text = path.read_bytes()
        raw, written = yaml.load(text, Loader=_UniqueKeys), _as_written(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise S3Error(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return _validated(model, lambda as_written: written if as_written else raw, str(path))


def _merged(source: str, config: DictConfig, settings: list[str], as_written: bool) -> dict[str, Any]:
    try:
        for setting in settings:
            key, _, value = setting.partition("=")
            parsed = _as_written(value) if as_written else OmegaConf.from_dotlist([f"value={value}"]).value
            # What is no mapping takes a mapping's place, for the check of the whole to refuse.
            OmegaConf.update(config, key, parsed, merge=isinstance(parsed, Mapping | DictConfig))
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise S3Error(f"{source}: {' '.join(str(error).split())}") from error


def _validated[M: BaseModel](model: type[M], merged: Callable[[bool], dict[str, Any]], source: str) -> M:
    """Check what ``merged(as_written)``, from ``source``, returns; a number where a text belongs stays as written.

    Raises:
        S3Error: keys or values are wrong; it names all of them.
    """
    raw = merged(False)
    written = merged(True)
    for loc in [error["loc"] for error in _errors(model, raw) if _is_number_for_text(error)]:
        reduce(getitem, loc[:-1], cast(Any, raw))[loc[-1]] = reduce(getitem, loc, cast(Any, written))
    problems = [_explained(model, one) for one in _errors(model, raw)]
    if problems := [*problems, *_other_numbers(raw, written, [])]:
        raise S3Error(f"{source}: {'; '.join(problems)}")
    return model.model_validate(raw)


def _other_numbers(raw: Any, written: Any, place: list[str]) -> Iterator[str]:
    """Yield what YAML has read as a number in base 60 (12:00:00 is 43200) or 8 (010 is 8), which nobody means."""
    if isinstance(raw, Mapping) and isinstance(written, Mapping):
        for key in [key for key in raw if key in written]:  # << brings more
            yield from _other_numbers(raw[key], written[key], [*place, key])
    elif isinstance(raw, int | float) and re.search(r":|^[-+]?0\d", str(written)):
        yield f"{'.'.join(place)} = {written}: YAML reads {raw}: write a plain number, in the setting's own unit"


def _errors(model: type[BaseModel], raw: dict[str, Any]) -> list[ErrorDetails]:
    try:
        model.model_validate(raw)
    except ValidationError as error:
        return error.errors()
    return []


def _is_number_for_text(error: ErrorDetails) -> bool:
    value = error["input"]
    return error["type"] == "string_type" and isinstance(value, int | float) and not isinstance(value, bool)


def _explained(model: type[BaseModel], error: ErrorDetails) -> str:
    place, what = [str(part) for part in error["loc"]], error["msg"].removeprefix("Value error, ")
    key, value = _written(place), error["input"]
    if error["type"] == "extra_forbidden":
        return f"{key} is unknown{_meant(model, place)}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"].startswith("union_tag"):
        return f"{key}.name must be one of {', '.join(OPTIMIZERS)}"
    what = _IN_YAML.get(error["type"], what)
    if not key:  # of the whole file
        return what
    return f"{key} = {json.dumps(value)}: {what}" if isinstance(value, str | int | float | None) else f"{key}: {what}"


def _written(place: Sequence[str]) -> str:
    """A key as files have it: a union's member is in its place by the member's name."""
    return ".".join([*place[:1], *place[2 if _is_member(place) else 1 :]])


def _is_member(place: Sequence[str]) -> bool:
    return len(place) > 1 and place[0] == "optimizer" and place[1] in OPTIMIZERS


def _meant(model: type[BaseModel], place: list[str]) -> str:
    """What an unknown key was meant to be: the key of this name elsewhere, or the nearest, of its own section first."""
    schema = model.model_json_schema()
    places = list(_places(schema, schema.get("$defs", {}), []))
    *section, name = place
    if _is_member(section):
        rivals = [each for each in places if _is_member(each) and each[1] != section[1]]
        if members := [each[1] for each in rivals if [*each[:1], *each[2:]] == [*section[:1], *section[2:], name]]:
            return f": it is a setting of {' and '.join(members)}, not of {section[1]}"
        places = [each for each in places if each not in rivals]
    if elsewhere := dict.fromkeys(_written(each) for each in places if each[-1] == name):
        return f"; did you mean {' or '.join(elsewhere)}?"
    here = {each[-1]: each[-1] for each in places if each[:-1] == section}
    for keys, likeness in ((here, 0.6), ({each[-1]: _written(each) for each in places}, 0.8)):
        if close := difflib.get_close_matches(name, keys, 1, likeness):
            return f"; did you mean {keys[close[0]]}?"
    return ""


def _places(node: dict[str, Any], sections: dict[str, Any], at: list[str]) -> Iterator[list[str]]:
    """Every key of a JSON schema, with its sections before it, as ``loc`` has it in an error."""
    for key, value in node.get("properties", {}).items():
        yield [*at, key]
        below: list[tuple[list[str], str]] = [
            ([], one["$ref"]) for one in (value, *value.get("anyOf", [])) if "$ref" in one
        ]
        members = [([name], ref) for name, ref in value.get("discriminator", {}).get("mapping", {}).items()]
        for member, reference in below + members:
            yield from _places(sections[reference.rpartition("/")[2]], sections, [*at, key, *member])
