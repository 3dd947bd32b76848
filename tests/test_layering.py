"""Who may import whom, as the packages' READMEs say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fnac_kernels

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "fnac_kernels"
PYTHON = sorted(KERNELS.rglob("*.py"))
NATIVE = [path for suffix in ("*.h", "*.cpp", "*.cu", "*.cuh") for path in sorted((ROOT / "csrc").rglob(suffix))]

# What each module of fnac_kernels may import of fnac_kernels.
ALLOWED = {
    "__init__": {"_dispatch", "_info", "_native", "compat", "functional", "modules", "reference"},
    "__main__": {"_info"},
    "compat": {"functional"},
    "modules": {"_dispatch", "_validate", "functional", "reference"},
    "functional": {"_dispatch", "_distributed", "_ops", "_validate", "reference"},
    "_distributed": {"_validate", "reference"},
    "_ops": {"_dispatch"},
    "_dispatch": {"_native", "backends"},
    "_info": {"_dispatch", "_native"},
    "_precision": set(),
    "_validate": set(),
    "_native": {"_C"},
    "reference": set(),
}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports; relative imports are not used anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    """Which modules of fnac_kernels a file imports, by their first name below the package."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("fnac_kernels.")}


@pytest.mark.parametrize("path", [p for p in PYTHON if p.parent == KERNELS], ids=lambda p: p.stem)
def test_modules_import_only_the_layer_below(path):
    assert own(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize("path", [p for p in PYTHON if "backends" in p.parts], ids=lambda p: p.stem)
def test_backends_do_not_import_each_other_nor_the_layers_above(path):
    allowed = {"_native", "_precision", "backends", "reference"}
    assert own(path) <= allowed
    backend = path.relative_to(KERNELS / "backends").parts[0].removesuffix(".py")
    others = {name.split(".")[2] for name in imports(path) if name.startswith("fnac_kernels.backends.")}
    assert others <= {backend}


def test_triton_is_imported_only_below_its_backend():
    users = {path for path in PYTHON if any(name.split(".")[0] == "triton" for name in imports(path))}
    assert all("triton" in path.relative_to(KERNELS / "backends").parts[0] for path in users)


def test_the_reference_needs_torch_alone():
    assert {name.split(".")[0] for name in imports(KERNELS / "reference.py")} <= {
        "__future__", "collections", "typing", "torch",
    }  # fmt: skip


def test_one_file_touches_the_compiled_module():
    users = {path.name for path in PYTHON if re.search(r"fnac_kernels\._C|import _C\b", path.read_text())}
    assert users == {"_native.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "fnac").rglob("*.py")), ids=lambda p: p.stem)
def test_the_training_stack_uses_public_names_only(path):
    for name in imports(path):
        if name.split(".")[0] == "fnac_kernels":
            assert name.removeprefix("fnac_kernels.") in (*fnac_kernels.__all__, "__version__"), name


def test_the_native_sources_keep_apart():
    assert NATIVE
    for path in NATIVE:
        included = re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))], path
        side = path.relative_to(ROOT / "csrc").parts[0]
        other = {"cpu": "cuda/", "cuda": "cpu/"}.get(side)
        assert other is None or not [name for name in included if other in name], path
