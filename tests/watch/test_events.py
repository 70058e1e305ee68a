"""A line and its event, and lines of another version, or of no event."""

import dataclasses
import json

import pytest

from s3_megatron.watch.events import RESERVED, Evaluation, Event, Optimizer, Train, Updates, decode, encode

EVENTS: list[Event] = [
    Optimizer("s3", "DistributedOptimizer", 2, 100, [50, 50], 4.0, 2.0),
    Train(8),
    Train(
        iteration=9,
        losses={"lm_loss": 5.5, "mtp_1_loss": 6.0},
        lr=1e-3,
        grad_norm=0.5,
        skipped=False,
        updates=Updates(0.1, 0.9, 0.01, 0.6),
        seconds=0.25,
        optimizers={"generator": Updates(0.1, 0.9, 0.01, 0.6), "discriminator": Updates(mean=0.2, max=3.0)},
    ),
    Evaluation("validation", 9, {"lm_loss": 5.0}),
    Evaluation("test", 9, {"lm_loss": 5.0}),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_what_is_written_is_read(event: Event) -> None:
    line = encode(event)
    assert "\n" not in line and decode(line) == decode(line.encode()) == event


def test_a_line_is_flat_and_has_the_names_of_the_page() -> None:
    line = json.loads(encode(EVENTS[2]))
    assert list(line) == [
        *("event", "iteration", "lm_loss", "mtp_1_loss", "lr", "grad_norm", "skipped"),
        *("update_mean", "update_max", "update_saturated", "update_agreement", "seconds", "optimizers"),
    ]
    assert line["optimizers"]["discriminator"]["update_max"] == 3.0
    assert "optimizers" not in json.loads(encode(EVENTS[1])), "only where there are several"
    assert set(line) - {"lm_loss", "mtp_1_loss"} <= RESERVED


def test_events_of_a_newer_version_are_passed_over() -> None:
    """A line {"event": "spike"} made `status` fail."""
    assert decode('{"event": "spike", "iteration": 7, "height": 2.0}') is None


def test_fields_of_a_newer_version_are_passed_over() -> None:
    line = json.loads(encode(EVENTS[0])) | {"device": "H200"}
    assert decode(json.dumps(line)) == EVENTS[0]
    line = json.loads(encode(EVENTS[1])) | {"phase": "decay", "shares": [1, 2], "spike": None, "is_spike": True}
    assert decode(json.dumps(line)) == EVENTS[1]


def test_lines_of_an_older_version_are_read() -> None:
    """NaN as Python writes it, and no sizes of updates."""
    event = decode('{"event": "train", "iteration": 3, "lm_loss": NaN, "lr": 0.1, "grad_norm": null}')
    assert isinstance(event, Train) and event.losses["lm_loss"] != event.losses["lm_loss"]
    assert dataclasses.replace(event, losses={}) == Train(3, lr=0.1)


NO_EVENTS = [
    "",
    "null",
    "7",
    '"train"',
    "[]",
    "{}",
    '{"event": null}',
    '{"event": ["train"]}',
    '{"event": {"train": 1}}',
    '{"event": "__class__", "iteration": 1}',
    '{"event": "optimizer"}',
    '{"event": "train"}',
    '{"event": "train", "iteration": "7"}',
    '{"event": "train", "iteration": 7.5}',
    '{"event": "train", "iteration": true}',
    '{"event": "train", "iteration": NaN}',
    '{"event": "train", "iteration": 7, "optimizers": [1]}',
    '{"event": "train", "iteration": 7, "lr": 1' + "0" * 400 + "}",
    '{"event": "train", "iteration": 1' + "0" * 5000 + "}",
    "[" * 100_000,
    '{"event": "train", "iteration": 7}{"event": "train", "iteration": 8}',
]


@pytest.mark.parametrize("line", NO_EVENTS, ids=range(len(NO_EVENTS)))
def test_what_is_no_event_is_none(line: str) -> None:
    """A file in a shared folder holds what anyone wrote there; a reader fails at nothing."""
    assert decode(line) is None
