"""Build backend: scikit-build-core, and without the native kernels where they cannot be compiled.

The kernels make the library faster and nothing else, so a machine without a C++ compiler, or with one that fails,
gets a package of plain Python. SPARING_NATIVE=0 asks for that, SPARING_NATIVE=1 makes a failed compilation an error.
"""

import os
import shutil
import sys

from scikit_build_core import build as backend
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

WANTED = os.environ.get("SPARING_NATIVE", "")
PLAIN = {"wheel.cmake": "false"}


def has_compiler():
    """Whether CMake will find a compiler: $CXX, or one of the usual names."""
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (named[:1] or ["c++", "g++", "clang++"]))


def compiles():
    return WANTED != "0" and (WANTED == "1" or has_compiler())


def get_requires_for_build_wheel(config_settings=None):
    return ["nanobind>=2.9", "cmake>=3.18", "ninja>=1.11"] if compiles() else []


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    settings = dict(config_settings or {}) | ({} if compiles() else PLAIN)
    return backend.prepare_metadata_for_build_wheel(metadata_directory, settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    settings = dict(config_settings or {}) | ({} if compiles() else PLAIN)
    return backend.prepare_metadata_for_build_editable(metadata_directory, settings)


def build(make, wheel_directory, config_settings, metadata_directory):
    settings = dict(config_settings or {})
    if compiles():
        try:
            return make(wheel_directory, settings, metadata_directory)
        except (Exception, SystemExit) as error:
            if WANTED == "1":
                raise
            print(f"warning: the native kernels do not compile here ({error})", file=sys.stderr)
    print("warning: sparing is installed without native kernels: slower on CPUs", file=sys.stderr)
    return make(wheel_directory, settings | PLAIN, None)  # metadata made for a compiled wheel would not match


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return build(backend.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return build(backend.build_editable, wheel_directory, config_settings, metadata_directory)
