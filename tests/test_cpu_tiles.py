"""The AMX kernels on a machine without AMX: tiles in plain code (``tests/emulation/tiles``), the rest as it ships."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "tiles"
TILES = ROOT / "tests" / "emulation" / "tiles"
COMPILER = os.environ.get("CXX", "c++")
TOOLS = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
MISSING = [name for name in ("cmake", "ninja", COMPILER) if shutil.which(name, path=TOOLS) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"to compile the kernels, {MISSING} would have to be there"),
    pytest.mark.skipif(
        not torch.cpu.get_capabilities().get("avx512_bf16"), reason="beside the tiles the kernels use AVX512_BF16"
    ),
]


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": TOOLS} | env
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def check(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip()


@functools.cache
def package() -> Path:
    """A folder with a copy of the package and, in it, the module with emulated tiles."""
    copy = BUILD / "package" / "fnac_kernels"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "fnac_kernels", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    pybind11 = check(run(sys.executable, "-m", "pybind11", "--cmakedir"))
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "FNAC_EMULATE_TILES": "ON",
        "FNAC_CUDA": "off",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": copy,
    }
    native = BUILD / "native"
    check(run("cmake", "-S", ROOT, "-B", native, "-GNinja", *(f"-D{name}={value}" for name, value in settings.items())))
    check(run("cmake", "--build", native))
    return copy.parent


def on_tiles(*command: object) -> str:
    """Python with the AMX kernels."""
    env = {"FNAC_CPU_ISA": "amx", "PYTHONPATH": str(package()), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "2"}
    return check(run(sys.executable, *command, **env))


def test_the_module_with_emulated_tiles_is_what_runs():
    code = "import fnac_kernels as fk; print(fk._native.module().__file__, fk.info()['cpu']['instruction_set'])"
    path, isa = on_tiles("-c", code).split()
    assert Path(path).is_relative_to(BUILD)
    assert isa == "amx"


@pytest.mark.parametrize("tests", ["test_backends.py", "test_cpu_exact.py"])
def test_the_amx_kernels_pass(tests):
    on_tiles("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}", "-k", "not reference")


@pytest.mark.parametrize("instructions", ["emulated", "real"])
def test_the_callers_tiles_come_back(tmp_path, instructions):
    includes = [ROOT / "csrc"] if instructions == "real" else [TILES, ROOT / "csrc"]
    program = tmp_path / "self_test"
    options = (*(f"-I{folder}" for folder in includes), "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror")
    check(run(COMPILER, *options, TILES / "self_test.cpp", "-o", program))
    done = run(program)
    if done.returncode == 77:
        pytest.skip("the processor has no AMX")
    check(done)
