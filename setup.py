"""Compiles the C++ kernel into the package when it is installed; all else is in pyproject.toml."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# By path: importing the package would need torch, which is not there yet.
_spec = importlib.util.spec_from_file_location("build", Path(__file__).parent / "s3_megatron/kernels/cpu/build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


class BuildKernel(build_ext):
    """Compiles by the same function as a first use does; a failure costs speed later, not the installation."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the library to where setuptools wants the extension."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_library(target)
        except build.BuildError as error:
            print(f"the C++ kernel was not compiled, S3 will try again at first use: {error}", file=sys.stderr)


setup(
    ext_modules=[Extension("s3_megatron.kernels.cpu._step", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernel},
)
