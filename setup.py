"""The parts of the build that pyproject.toml cannot say: the compiled kernel, the wheel's tag, links, the README."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Links in the package to folders of the project, so that a wheel brings these along.
LINKS = {
    "s3_megatron/jobs/configs": "configs",
    "s3_megatron/jobs/templates": "launch/slurm",
    "s3_megatron/patch/patches": "patches",
}

# By path: importing the package would need torch, which is not there yet.
_spec = importlib.util.spec_from_file_location("build", ROOT / "s3_megatron/kernels/cpu/build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


class BuildKernel(build_ext):
    """Compiles by the same function as a first use does; a failure costs speed later, not the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without Python's ABI, of which it knows nothing."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile the library to where setuptools wants the extension."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_library(target)
        except build.BuildError as error:
            target.unlink(missing_ok=True)  # an older build's
            print(f"the C++ kernel was not compiled, S3 will try again at first use: {error}", file=sys.stderr)


class BuildPackage(build_py):
    """Copies what the package's links mean, also from a checkout that has text files in their place."""

    def run(self) -> None:
        """Copy the package; git on Windows, and some unpackers of archives, make no links."""
        broken = {link: folder for link, folder in LINKS.items() if not (ROOT / link).is_dir()}
        if broken and self.editable_mode:
            raise SystemExit(
                f"{next(iter(broken))} is no folder and no link: check out again with `git config core.symlinks true`, "
                "or install without --editable"
            )
        if not self.editable_mode:  # a file that the package no longer has would go in from an older build
            shutil.rmtree(Path(self.build_lib, "s3_megatron"), ignore_errors=True)
        super().run()
        for link, folder in broken.items():
            shutil.copytree(ROOT / folder, Path(self.build_lib, link), dirs_exist_ok=True)


class Wheel(bdist_wheel):
    """A wheel for any Python 3 on one kind of machine: the library is loaded by ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Name the machine alone."""
        return "py3", "none", super().get_tag()[2]


def readme() -> str:
    """The README as an index shows it, where there is nothing for its relative links to lead to."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    ext_modules=[Extension("s3_megatron.kernels.cpu._step", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernel, "build_py": BuildPackage, "bdist_wheel": Wheel},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
