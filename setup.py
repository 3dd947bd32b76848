"""Builds the native module ``fnac_kernels._C`` with CMake and Ninja; torch is not needed to build."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA_CHOICES = ("auto", "on", "off")
#: What CMake reads once and keeps in its build folder.
KEPT_BY_CMAKE = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH")


def cuda_options(environment: Mapping[str, str]) -> list[str]:
    """CMake's definitions for what the environment says of CUDA: FNAC_CUDA, and the architectures to compile for.

    Raises:
        SystemExit: a variable holds something else than it should.
    """
    choice = environment.get("FNAC_CUDA") or "auto"
    if choice not in CUDA_CHOICES:
        raise SystemExit(f"fnac_kernels: FNAC_CUDA is {choice!r}; it should be one of {', '.join(CUDA_CHOICES)}")
    architectures = environment.get("CMAKE_CUDA_ARCHITECTURES", "")
    if not architectures and choice != "off":
        architectures = _from_torch(environment.get("TORCH_CUDA_ARCH_LIST", ""))
    # Both always, the empty list for the default, so that nothing of an earlier build stays.
    return [f"-DFNAC_CUDA={choice}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]


def _from_torch(architectures: str) -> str:
    """``"8.0;9.0+PTX"``, as PyTorch's extensions are told, in CMake's words: ``"80-real;90"``."""
    translated = []
    for name in architectures.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(
                f"fnac_kernels: TORCH_CUDA_ARCH_LIST has {name!r}; it should hold numbers such as 8.0 or 9.0+PTX, "
                "separated by semicolons or spaces"
            )
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) < 75:
            print(f"fnac_kernels: TORCH_CUDA_ARCH_LIST has {name}, which is left out: the kernels need 7.5 or newer")
            continue
        translated.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(translated)


def build_folder(root: Path, environment: Mapping[str, str]) -> Path:
    """One for each place and choice of compilers: CMake takes up no folder that was moved, nor another compiler."""
    made_by = "\0".join([str(root), *(environment.get(name, "") for name in KEPT_BY_CMAKE)])
    return root / "build" / f"native-{sys.implementation.cache_tag}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"


class CMakeBuild(build_ext):
    """One CMake project makes the extension; a failure names the step."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ModuleNotFoundError as error:
            raise SystemExit("fnac_kernels: building needs pybind11 (pip install pybind11)") from error
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = build_folder(ROOT, os.environ)
        build.mkdir(parents=True, exist_ok=True)
        self._step(
            "configure",
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            # Again each time: the one of the last build may have been in pip's temporary environment.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *cuda_options(os.environ),
        )
        self._step("compile", "cmake", "--build", str(build))

    def _step(self, name: str, *command: str) -> None:
        try:
            subprocess.run(command, check=True, env=os.environ)
        except FileNotFoundError as error:
            raise SystemExit(
                f"fnac_kernels: the {name} step needs {command[0]} on PATH (pip install cmake ninja)"
            ) from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"fnac_kernels: the {name} step failed (exit {error.returncode}); a C++20 compiler and ninja are "
                "needed, the cause stands above. Where nvcc is the cause, FNAC_CUDA=off builds without CUDA"
            ) from error


if __name__ == "__main__":  # tests import this file
    setup(ext_modules=[Extension("fnac_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
