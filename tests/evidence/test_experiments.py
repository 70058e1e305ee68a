"""The files of configs/experiments: what each expands to, that its runs can be trained, and the hash of its rules."""

import json
import lzma
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from s3_megatron import cli
from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, compare, experiments, quick, reading, report, text
from s3_megatron.evidence.experiments import LATER, Entry, Tuning
from s3_megatron.evidence.plan import Plan
from s3_megatron.evidence.training import train
from tests.evidence import simulated

NAMES = sorted(path.stem for path in reading.CONFIGS.glob("*.yaml"))
DATA = Path(__file__).parent / "data"


class InProcess:
    """A pool that trains every stack it is asked to time: five steps of a tiny model, in this process.

    Five, so that a run that is hard for .9 of its steps has a soft one.

    In place of processes, which take 10 s to start for each of ten experiments.
    """

    corpus: text.Text
    trained: list

    def __init__(self, *_) -> None:
        self.free, self.cells = 1, []

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def probe(self, cells) -> None:
        small = {"steps": 5, "layers": 1, "width": 16, "heads": 2, "length": 16, "batch": 2, "validation": 64}
        tiny = [replace(c, setup=replace(c.setup, **small, kick_step=min(1, c.setup.kick_step))) for c in cells]
        results = train(tiny, self.corpus)
        assert all(r["validation"] < math.log(cells[0].setup.vocabulary) + 0.45 for r in results)
        self.free, self.cells = 0, cells
        self.trained.append(cells)

    def finished(self, _):
        cells, self.cells, self.free = self.cells, [], 1
        return [(cells, 0.01 * len(cells))]


@pytest.fixture
def in_process(corpus, monkeypatch):
    monkeypatch.setattr(InProcess, "corpus", corpus, raising=False)
    monkeypatch.setattr(InProcess, "trained", [], raising=False)
    monkeypatch.setattr(compare, "Workers", InProcess)
    monkeypatch.setattr(text, "load", lambda *of: corpus)
    return InProcess


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_can_be_planned_and_is_in_the_page_of_rules(name):
    asked = experiments.load(name)
    assert Plan(asked, simulated.TEXT).ready({})
    assert f"`{name}`" in (Path(__file__).parents[2] / "docs/evidence.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_of_every_experiment(name, in_process, capsys, monkeypatch, tmp_path):
    """The budget is printed, each kind of stack is trained for some steps with its settings, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    cli.compare(name, dry_run=True)
    asked = experiments.load(name)
    printed = capsys.readouterr().out
    cells = sum(Plan(asked, "").total().values())
    assert (
        f"{asked.name}: " in printed
        and sum(int(words[1]) for words in map(str.split, printed.splitlines()) if words and words[0] in asked.setups)
        == cells
    )
    kinds = {(setup, entry.optimizer) for setup in asked.setups for entry in asked.contenders.values()}
    assert {compare.kind(stack[0]) for stack in in_process.trained} == kinds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_every_grid_can_be_trained(name, in_process):
    """Five steps with each value of each sweep and each contender's own settings: a typing error would cost a night."""
    asked = experiments.load(name)
    plan, setup = Plan(asked, "t"), next(iter(asked.setups))
    seen = set()
    for contender, entry in asked.contenders.items():
        for change in [{}, *({key: value} for key, values in entry.sweep.items() for value in values)]:
            settings = json.dumps({**entry.settings, **change}, sort_keys=True)
            if (entry.optimizer, settings) not in seen:
                seen.add((entry.optimizer, settings))
                in_process().probe([plan.cell(contender, setup, (entry.rates[0], settings), 1)])


# What cells files carry that were begun by these; another hash would strand them.
@pytest.mark.parametrize(
    "name, rules",
    [
        ("table2-small", "21e6b80f4c8665d4"),
        ("table4-small", "37576836f66a4b68"),
        ("rates-tiny", "e7cd2e5f3991e777"),
        ("softsign_small", "d00948be8c07584b"),
        ("softsign-pairs", "ed3dac3df01a3246"),
        ("softsign-constant", "88f38efb9b02ffec"),
        ("softmuon-quintic", "b8b613200b81494e"),
    ],
)
def test_the_rules_that_cells_were_begun_by_are_unchanged(name, rules):
    """Runs of 2026-11-28 go on for nights, and later code reads them: table2-small's began with 3b7642f."""
    assert experiments.load(name).sha256[:16] == rules


def test_a_later_setting_leaves_older_hashes_and_keys_alone():
    """At its default it is no part of the rules; set to another value it is."""
    asked = simulated.experiment()
    assert "wide" not in json.dumps(experiments.rules(asked))
    wide = replace(asked, tuning=replace(asked.tuning, wide=True))
    assert wide.sha256 != asked.sha256 and "wide" in json.dumps(experiments.rules(wide))
    assert all(field.metadata in ({}, LATER) for field in Tuning.__dataclass_fields__.values())


def test_a_seed_alone_is_in_the_rules_as_before_and_several_are_other_rules():
    """`seeds` came after runs with `seed` were recorded."""
    one, several = (simulated.experiment(tuning=Tuning(**seeds, runs=8)) for seeds in ({"seed": 0}, {"seeds": [0, 9]}))
    assert experiments.rules(one)["tuning"] == {"seed": 0, "runs": 8}
    assert experiments.rules(several)["tuning"] == {"seed": None, "runs": 8, "seeds": [0, 9]}
    assert Plan(one, "t").ready({})[0].key == Plan(several, "t").ready({})[0].key, "a run is a run, whatever for"


def test_a_number_may_be_written_with_and_without_a_point_and_signs():
    """PyYAML takes 1e-3 and 1.5e3 for text, and a rate that is text is refused for its type."""
    assert reading.parse("[1e-3, 1.5e3, 2E+4, -1.e2, 1.5e-3]") == [1e-3, 1.5e3, 2e4, -1e2, 1.5e-3]


def test_a_mapping_may_overrule_what_it_merges(tmp_path):
    """`<<: *base` and another value of a key is how setups are written; only a key given twice is refused."""
    (tmp_path / "x.yaml").write_text(
        "{title: t, reference: a, text: none, seeds: [1],\n"
        " setups: {one: &base {steps: 5, clip: 2.0}, two: &two {<<: *base, clip: 0}, three: {<<: *two, steps: 6}},\n"
        " contenders: {a: {optimizer: s3, rates: [1e-3]}}}\n"
    )
    setups = experiments.load(str(tmp_path / "x.yaml")).setups.values()
    assert [(setup.steps, setup.clip) for setup in setups] == [(5, 2), (5, 0), (6, 0)]


def test_cells_of_an_older_commit_are_read_and_reported_as_what_they_are():
    """Three lines that 3b7642f wrote: its first line, and two tuning runs of table2-small, curves cut short."""
    asked = experiments.load("table2-small")
    head, found = analysis.read(DATA / "table2-small-3b7642f.jsonl", asked)
    assert head == {
        "experiment": "table2-small",
        "rules": "21e6b80f4c8665d4",
        "text": "802beb667e1fb666",
        "code": "29b3daa87f307e4a",
        "commit": "3b7642f388",
    }
    page = report.render(head, found)
    assert "2 of 108 cells. Nothing is ranked yet" in page
    assert "- s3: 2 of 10 tuning runs are finished, no final run can start before" in page
    lines = [json.loads(line) for line in (DATA / "table2-small-3b7642f.jsonl").read_text().splitlines()[1:]]
    keys = {
        Plan(asked, SHA256)
        .cell(r["contender"], r["setup"], (r["rate"], json.dumps(r["settings"], sort_keys=True)), r["seed"])
        .key
        for r in lines
    }
    assert keys == {line["key"] for line in lines}, "a run would be run again: its key is another now"
    for line in lines:
        assert f"| {line['key']} | base | s3 | {line['rate']:g} |" in page


SHA256 = "802beb667e1fb666203e750f1faea60d5c202ac5430c2083c4180494609f10a7"  # of gcide


class TestEach:
    """An entry with ``each`` is a contender a combination."""

    def load(self, tmp_path, **entry):
        content = {
            "title": "t", "reference": "x-p2-no-nesterov", "text": "none", "setups": {"base": {"steps": 5}},
            "seeds": [1],
            "contenders": {"x": {"optimizer": "s3", "rates": [1e-3], "settings": {"beta": 0.9}, **entry}},
        }  # fmt: skip
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return experiments.load(str(tmp_path / "x.yaml"))

    def test_the_names_say_the_settings(self, tmp_path):
        found = self.load(tmp_path, each={"p": [2, 1.5], "nesterov": [True, False]}).contenders
        assert list(found) == ["x-p2-nesterov", "x-p2-no-nesterov", "x-p1.5-nesterov", "x-p1.5-no-nesterov"]
        assert found["x-p1.5-no-nesterov"] == Entry("s3", [1e-3], {"beta": 0.9, "p": 1.5, "nesterov": False})

    @pytest.mark.parametrize("each", [[1], {"p": 2}, "p"])
    def test_what_is_no_mapping_of_lists_is_refused(self, each, tmp_path):
        with pytest.raises(
            S3Error, match=r"x.yaml: contenders.x.each is .*: it must be a mapping of settings to lists"
        ):
            self.load(tmp_path, each=each)

    def test_the_papers_rows_and_the_grid_are_in_table4(self):
        for name in ("table4", "table4-small"):
            asked = experiments.load(name)
            s3 = [entry.settings for entry in asked.contenders.values() if entry.optimizer == "s3"]
            assert len(s3) == 36 and len({json.dumps(settings, sort_keys=True) for settings in s3}) == 36
            assert len(asked.seeds) == 5 and {"adamw", "adamw-one-beta", "adamw-clipped"} <= set(asked.contenders)


class TestText:
    """Texts of several parts."""

    def test_parts_follow_each_other(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "folder", lambda: tmp_path)
        whole = quick.text()
        for name, part in (("gcide", whole[:1000]), ("sympy", whole[1000:])):
            (tmp_path / f"{name}.xz").write_bytes(lzma.compress(part, preset=0))
        assert text.load("gcide+sympy").sha256 == text.cut(whole).sha256
        assert text.load("sympy+gcide").sha256 != text.cut(whole).sha256
        with pytest.raises(
            S3Error, match=r"the text gcid is not here: give an .xz file's path, or one of gcide, wordnet"
        ):
            text.load("gcide+gcid")

    def test_a_text_that_cannot_be_fetched_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "folder", lambda: tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(
            S3Error, match=r"the text wordnet is Debian's package dict-wn, .*: run the same command with --dry-run"
        ) as caught:
            text.load("wordnet")
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_ladders_runs_see_their_text_no_more_than_twice():
    """The sizes of Debian 12's texts, less a fortieth for validation."""
    size = (40 + 31 + 31) * 1e6 * 39 / 40
    for setup in experiments.load("ladder").setups.values():
        assert setup.steps * setup.batch * setup.length <= 2 * size
        assert setup.steps * setup.batch * setup.length >= 19 * setup.model.parameters()
