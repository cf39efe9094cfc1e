"""Builds the native kernels with the package; everything else stands in pyproject.toml.

They are optional: where they cannot be compiled the package is installed without them, and the
plain XLA implementations run.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("pallas_kernels", "native")

# By path: importing the package would import JAX.
spec = importlib.util.spec_from_file_location("native_build", FOLDER / "build.py")
assert spec is not None
assert spec.loader is not None
native_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native_build)


class BuildNative(build_ext):
    """Builds a library that is loaded by path and not a Python module."""

    def get_ext_filename(self, fullname):
        """The same name for every Python: the library knows none."""
        return os.path.join(*fullname.split(".")[:-1], native_build.LIBRARY)

    def build_extension(self, ext):
        """Builds it, or says why not; ``optional`` makes of that a warning."""
        try:
            out = Path(self.get_ext_fullpath(ext.name))
            native_build.build_library(out, os.environ.get("CXX", "c++"))
        except native_build.BuildError as error:
            raise CompileError(str(error)) from error


class PlatformWheel(bdist_wheel):
    """Tags the wheel with the platform alone."""

    def get_tag(self):
        """Any Python 3 on this platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("pallas_kernels.native._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
