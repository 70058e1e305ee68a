"""What has changed in a run since its script was written: its recipe.yaml, its cluster.yaml, or where it is."""

import json
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.files import write_file
from s3_megatron.jobs.catalog import as_yaml
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.render import render
from s3_megatron.jobs.runs import Run, settings, write_about

# What the run's checkpoints, its folder or its script have of these holds for the whole run. Keys, or their beginnings.
_FIXED = (
    *("name", "engine", "deepspeed", "precision", "optimizer.name", "cluster.scheduler"),
    *("model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.ffn_hidden_size"),
    *("model.seq_length", "model.vocab_size", "layout.tensor", "layout.pipeline", "layout.context"),
)
# Without one of them Megatron refuses another schedule than the checkpoint's.
_OVERRIDE, _KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


def apply(run: Run) -> list[str]:
    """Write the script of ``run`` again where its settings were edited or its folder moved; returns a line a change.

    Another schedule or other rates add ``--override-opt-param-scheduler`` to the recipe's ``flags``.

    Raises:
        S3Error: the files have keys or values that are wrong, or that cannot change within a run; nothing is written.
    """
    about = _about(run)
    job = run.job
    now = settings(job, run.path)
    before = {"folder": now["folder"], **about.get("settings", now)}  # runs from before 2026-12 do not have the folder
    if not (changed := _changed(before, now)):
        return []
    if fixed := [key for key in changed if key in _FIXED]:
        raise S3Error(
            f"{run.path.name} cannot go on with {', '.join(changed[key] for key in fixed)}: put back what recipe.yaml "
            "and cluster.yaml had, or submit a new run"
        )
    rates = any(key.startswith(("schedule.", "optimizer.")) for key in changed)
    if rates and not {_OVERRIDE, _KEEP} & set(job.recipe.flags):
        job = Job(job.recipe.model_copy(update={"flags": (*job.recipe.flags, _OVERRIDE)}), job.cluster)
        changed = _changed(before, settings(job, run.path))
    script = render(job, run.path)
    write_file(run.recipe, as_yaml(job.recipe).encode())
    write_file(run.script, script.encode())
    write_about(run, {**about, "settings": settings(job, run.path)})  # last: after an interruption all is done again
    return list(changed.values())


def _about(run: Run) -> dict[str, Any]:
    """Read what the run's script was made of; raises S3Error where that is gone."""
    try:
        about = json.loads(run.about.read_bytes())
        if isinstance(about, dict):
            return about
        why = "holds no settings"
    except (OSError, ValueError) as error:
        why = f"cannot be read ({error})"
    raise S3Error(f"{run.about} {why}: bring it back, or submit its recipe.yaml as a new run")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Describe every key with another value, the old one and the new one."""
    return {
        key: f"{key} {before.get(key)} -> {now.get(key)}"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    }
