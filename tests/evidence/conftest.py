"""Text and experiments of a size for tests."""

import lzma
import pydoc_data.topics
from pathlib import Path

import pytest
import yaml

from s3_megatron.evidence import quick, reading, text
from s3_megatron.evidence.experiments import Setup


@pytest.fixture(scope="session")
def corpus() -> text.Text:
    """What every Python has: its own documentation, as often as fills the blocks."""
    topics = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()
    size = text.BLOCK * text.EVERY
    return text.cut((topics * (size // len(topics) + 1))[: size + 1])


@pytest.fixture(scope="session")
def setup() -> Setup:
    return Setup(steps=20, layers=2, width=32, heads=2, length=16, batch=4, validation=1024, watch_every=5, decay=1e-3)


@pytest.fixture(scope="module")
def quick_file(tmp_path_factory) -> Path:
    """The quick experiment with two contenders and its text elsewhere."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "text.xz").write_bytes(lzma.compress(quick.text(), preset=0))
    content = yaml.safe_load((reading.CONFIGS / "quick.yaml").read_text())
    del content["contenders"]["lion"]
    content |= {"text": str(folder / "text.xz"), "seeds": [1, 2]}
    (folder / "quick.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "quick.yaml"
