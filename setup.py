"""Builds the native module ``fnac_kernels._C`` with CMake and Ninja; torch is not needed to build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake project makes the extension; a failure names the step."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / "native"
        build.mkdir(parents=True, exist_ok=True)
        self._step(
            "configure",
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
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
                f"fnac_kernels: the {name} step failed (exit {error.returncode}); "
                "a C++20 compiler and ninja are needed, the cause stands above"
            ) from error


setup(ext_modules=[Extension("fnac_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
