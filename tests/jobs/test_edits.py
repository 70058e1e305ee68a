"""What was edited in a run, or moved, is printed and applied, or refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from s3_megatron.errors import S3Error
from s3_megatron.jobs import edits, submit
from s3_megatron.jobs.runs import Run
from tests.jobs.run_folders import make

pytestmark = pytest.mark.usefixtures("state_folder")


def edit(run: Run, **settings: Any) -> Run:
    """Write ``settings``, by dotted keys, into the run's recipe.yaml, as a person does in an editor."""
    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    for key, value in settings.items():
        *sections, last = key.split("__")
        section = recipe
        for name in sections:
            section = section[name]
        section[last] = value
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Run(run.path)


def test_what_was_edited_in_a_run_is_printed_and_applied(tmp_path: Path):
    """The script was rendered once: whoever edited recipe.yaml and resumed silently got the old settings."""
    run = make(tmp_path)
    script = run.script.read_text()
    assert edits.apply(Run(run.path)) == [] and run.script.read_text() == script
    flag = "--override-opt-param-scheduler"
    run = edit(run, checkpoint__save_interval=7)
    assert edits.apply(run) == ["checkpoint.save_interval 32 -> 7"]
    assert "--save-interval 7" in run.script.read_text() and flag not in run.script.read_text()
    lines = edits.apply(edit(run, optimizer__lr=0.001, schedule__train_iters=999))
    assert lines == [
        "schedule.train_iters 128 -> 999",
        "optimizer.lr 0.003 -> 0.001",
        f"flags [] -> ['{flag}']",
    ]
    script = run.script.read_text()
    assert all(words in script for words in ("--lr 0.001", "--train-iters 999", "--save-interval 7", flag))
    assert edits.apply(Run(run.path)) == [], "applied once"
    assert Run(run.path).job.recipe.flags == (flag,)


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path: Path):
    """Its script named the old folder: a demonstration that was set aside trained on in the one that came after it."""
    run = make(tmp_path)
    moved = run.path.rename(tmp_path / "runs/größer")
    assert edits.apply(Run(moved)) == [f"folder {run.path} -> {moved}"]
    script = Run(moved).script.read_text()
    assert str(run.path) not in script and f"run='{moved}'" in script
    assert edits.apply(Run(moved)) == [], "applied once"
    about = json.loads(Run(moved).about.read_text())
    del about["settings"]["folder"]
    Run(moved).about.write_text(json.dumps(about))
    assert edits.apply(Run(moved)) == [], "made before the folder was written down"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__num_layers": 3}, "cannot go on with model.num_layers 4 -> 3"),
        ({"engine": "deepspeed"}, "cannot go on with engine megatron -> deepspeed"),
        ({"model__num_layer": 3}, "model.num_layer is unknown; did you mean num_layers"),
        ({"schedule__train_iters": "many"}, 'schedule.train_iters = "many"'),
    ],
)
def test_what_a_run_cannot_change_is_refused_and_nothing_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
):
    run = make(tmp_path)
    script, about = run.script.read_text(), (run.path / "about.json").read_text()
    with pytest.raises(S3Error, match=re.escape(message)):
        edits.apply(edit(run, **settings))
    assert (run.script.read_text(), (run.path / "about.json").read_text()) == (script, about)


def test_a_recipe_that_is_no_yaml_any_more_is_one_line(tmp_path: Path):
    run = make(tmp_path)
    (run.path / "recipe.yaml").write_text("name: [")
    with pytest.raises(S3Error, match=r"recipe\.yaml is no YAML"):
        submit.resume(Run(run.path), print)
