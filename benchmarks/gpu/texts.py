"""The text for a machine without a network, as one file: ``make gpu-text``, or here ``python -m benchmarks.gpu.texts``.

It has every text that the experiments name, each compressed, as s3_megatron.evidence.text makes it of Debian's package.
"""

import sys
import tarfile
from pathlib import Path

from benchmarks.gpu.wheels import ROOT
from s3_megatron.evidence import text

FILE = ROOT / ".text.tar"
MOST_BYTES = 20 << 20


def main() -> None:
    """Write the file anew."""
    for name in text.PACKAGES:
        text.load(name)
    files = [text.folder() / f"{name}.xz" for name in text.PACKAGES]
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES:
        sys.exit(f"the texts have {size / 2**20:.1f} MiB, and at most {MOST_BYTES >> 20} travel: name fewer")
    partial = FILE.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for file in files:
            tar.add(file, file.name)
    partial.replace(FILE)
    print(f"{', '.join(text.PACKAGES)}: {size / 2**20:.1f} MiB, in {FILE.name}")


def unpack(file: Path) -> None:
    """Lay the texts out where they are looked for."""
    text.folder().mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as tar:
        tar.extractall(text.folder(), filter="data")


if __name__ == "__main__":
    main()
