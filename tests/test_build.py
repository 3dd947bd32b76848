"""The native build: what the environment says of CUDA, why CUDA stays out, what the module needs, the sdist."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

from fnac_kernels import _native

ROOT = Path(__file__).parent.parent
needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and importlib.util.find_spec("pybind11")),
    reason="the build's own tools are missing",
)
with_cuda = pytest.mark.skipif(
    _native.problem() is not None or not hasattr(_native.module(), "cuda"), reason="built without CUDA"
)


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module; it builds only as a program."""
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("fnac_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("environment", "choice", "architectures"),
    [
        ({}, "auto", ""),
        ({"FNAC_CUDA": "", "TORCH_CUDA_ARCH_LIST": ""}, "auto", ""),
        ({"FNAC_CUDA": "on", "TORCH_CUDA_ARCH_LIST": "8.0"}, "on", "80-real"),
        ({"FNAC_CUDA": "on", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "on", "80-real;90"),
        ({"FNAC_CUDA": "off", "TORCH_CUDA_ARCH_LIST": "Hopper"}, "off", ""),
        ({"TORCH_CUDA_ARCH_LIST": "8.6 9.0a  12.0+PTX"}, "auto", "86-real;90a-real;120"),
        ({"TORCH_CUDA_ARCH_LIST": "10.0f;"}, "auto", "100f-real"),
        ({"TORCH_CUDA_ARCH_LIST": "6.1 7.0 7.5 8.0+PTX"}, "auto", "75-real;80"),
        ({"CMAKE_CUDA_ARCHITECTURES": "90-virtual", "TORCH_CUDA_ARCH_LIST": "8.0"}, "auto", "90-virtual"),
    ],
)
def test_the_environment_in_cmakes_words(setup, environment, choice, architectures):
    assert setup.cuda_options(environment) == [
        f"-DFNAC_CUDA={choice}",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
    ]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FNAC_CUDA": "ON"}, "FNAC_CUDA is 'ON'; it should be one of auto, on, off"),
        (
            {"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"},
            "TORCH_CUDA_ARCH_LIST has 'Hopper'; it should hold numbers such as 8.0",
        ),
        ({"TORCH_CUDA_ARCH_LIST": "90"}, "TORCH_CUDA_ARCH_LIST has '90'"),
    ],
)
def test_what_the_environment_cannot_mean_is_named(setup, environment, message):
    with pytest.raises(SystemExit, match=message):
        setup.cuda_options(environment)


def configure(folder: Path, *definitions: str, hide_nvcc: bool = False) -> subprocess.CompletedProcess[str]:
    """CMake's first step in a fresh folder, with nvcc out of its sight where asked."""
    import pybind11

    env = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    if hide_nvcc:
        hidden = [
            str(place)
            for place in (*map(Path, os.environ["PATH"].split(os.pathsep)), Path("/usr/local/cuda/bin"))
            if (place / "nvcc").exists()
        ]
        definitions += (f"-DCMAKE_IGNORE_PATH={';'.join(hidden)}",)
    fixed = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-GNinja", *fixed, *definitions]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@needs_cmake
def test_without_nvcc_one_line_says_that_cuda_is_left_out_and_why(tmp_path):
    done = configure(tmp_path, hide_nvcc=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "CUDA is left out" in line]
    assert len(lines) == 1
    assert "nvcc was neither on PATH nor in CUDA_HOME or /usr/local/cuda; install CUDA 12.0 or newer" in lines[0]


def test_a_build_starts_anew_where_cmake_would_not_take_up_the_last_one(setup, tmp_path):
    """CMake refuses a folder that was moved, and stays with the compiler that it met first."""
    here = setup.build_folder(tmp_path, {"CXX": "g++", "HOME": "/"})
    assert here == setup.build_folder(tmp_path, {"CXX": "g++", "FNAC_CUDA": "off"})
    others = [
        setup.build_folder(tmp_path / "moved", {"CXX": "g++"}).name,
        setup.build_folder(tmp_path, {"CXX": "clang++"}).name,
        setup.build_folder(tmp_path, {"CXX": "g++", "CUDACXX": "nvcc"}).name,
    ]
    assert len({here.name, *others}) == 4


@needs_cmake
def test_a_second_build_finds_the_ninja_that_there_is_now(setup, tmp_path, monkeypatch):
    """pip builds in an environment that is gone the next time."""
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.22)\nproject(nothing LANGUAGES NONE)\n")
    build = setup.CMakeBuild(setuptools.Distribution({"ext_modules": [setuptools.Extension("_C", [])]}))
    build.ensure_finalized()
    ninja = shutil.which("ninja")
    for environment in (tmp_path / "first", tmp_path / "second"):
        environment.mkdir()
        (environment / "ninja").symlink_to(ninja)
        monkeypatch.setenv("PATH", f"{environment}{os.pathsep}{os.environ['PATH']}")
        build.build_extension(build.extensions[0])
        (environment / "ninja").unlink()


@needs_cmake
@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        (("-DFNAC_CUDA=on",), "FNAC_CUDA is on, but nvcc was neither on PATH nor in CUDA_HOME"),
        (("-DFNAC_CUDA=maybe",), "FNAC_CUDA is 'maybe'; it should be auto, on or off"),
    ],
)
def test_an_order_that_cannot_be_met_stops_the_build(tmp_path, definitions, message):
    done = configure(tmp_path, *definitions, hide_nvcc=True)
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stderr)


@needs_cmake
def test_an_nvcc_that_does_not_compile_is_left_out_with_the_way_to_see_why(tmp_path, monkeypatch):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = configure(tmp_path / "build")
    assert done.returncode == 0, done.stderr
    assert f"CUDA is left out: {broken} compiled nothing; a build with FNAC_CUDA=on shows why" in done.stdout


@needs_cmake
@with_cuda
@pytest.mark.parametrize(
    ("asked", "why"),
    [("native", "but there is no CUDA device here"), ("OFF", "name numbers, such as 90, or set FNAC_CUDA=off")],
)
def test_architectures_are_numbers_or_those_of_a_device(tmp_path, monkeypatch, asked, why):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = configure(tmp_path, f"-DCMAKE_CUDA_ARCHITECTURES={asked}")
    assert done.returncode != 0
    assert re.search(f"CMAKE_CUDA_ARCHITECTURES is {asked}[,;] {why}", re.sub(r"\s+", " ", done.stderr))


def tool(name: str, *arguments: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not on PATH")
    return subprocess.run(
        [name, *arguments, _native.module().__file__], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(_native.problem() is not None, reason="the compiled module is not built")
def test_the_module_needs_no_cuda_library():
    """So it imports where there is no driver, and beside a torch of any CUDA version."""
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool("readelf", "-d"))
    assert any(name.startswith("libstdc++") for name in needed)
    assert not [name for name in needed if re.match(r"lib(cu|nv)", name)]


@with_cuda
def test_the_runtime_linked_in_keeps_its_symbols_to_itself():
    functions = re.findall(r" [TW] (\S+)", tool("nm", "-D", "--defined-only"))
    assert [name for name in functions if not name.startswith("_Z")] == ["PyInit__C"]
    assert not [name for name in functions if "cuda" in name.lower()]


@with_cuda
def test_info_names_the_compiler_and_what_it_compiled_for():
    features = _native.cuda_features()
    assert re.fullmatch(r"\d+\.\d+\.\d+", features["compiler"])
    assert features["architectures"]
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in features["architectures"])


def test_the_source_distribution_holds_what_the_build_reads(tmp_path):
    pytest.importorskip("pybind11")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "sdist",
        "--dist-dir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert (
        sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "fnac_kernels/_native.py", "fnac_kernels/py.typed"}
        <= names
    )
