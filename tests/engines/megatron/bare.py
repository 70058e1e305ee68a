"""Runs a Megatron script in the rehearsal without S3 installed: what Megatron does by itself."""

import runpy
import sys
from pathlib import Path

from s3_megatron import rehearsal
from s3_megatron.train.entry import skip_helper_build

if __name__ == "__main__":
    rehearsal.activate()
    skip_helper_build()
    sys.argv = rehearsal.add_flags(sys.argv[1:])
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
