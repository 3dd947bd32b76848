"""``bench/on_gpu.sh`` leaves a log and JSON that say how each stage ended, whatever happens: run with stubs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "on_gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
#: A Python whose device is fine, whose build fails and whose tests hang.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *sysconfig*) echo /nonexistent ;;
    *"import importlib.metadata"*) echo 'python "stub"' ;;
    *setup.py*) echo the compiler broke; exit 3 ;;
    *test_backends.py*) exec sleep 60 ;;
esac
"""


def run(folder: Path, **environment: str) -> tuple[int, dict, str]:
    """Status, on_gpu.json and the log."""
    tools = folder / "tools"
    tools.mkdir()
    for name, text in {"python": PYTHON, **dict.fromkeys(("cmake", "ninja", "c++", "nvcc"), "#!/bin/sh\n")}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    paths = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "OUT": str(folder / "out")}
    status = subprocess.run(["bash", SCRIPT], env=os.environ | paths | environment, capture_output=True).returncode
    left = folder / "out"
    return status, json.loads((left / "on_gpu.json").read_text()), (left / "on_gpu.log").read_text()


def test_a_build_that_fails_and_tests_that_hang_are_told(tmp_path):
    status, told, log = run(tmp_path, ONLY="device build table-cuda device-tests", LIMIT="9")
    assert status == 1
    assert told["outcome"] == "failed"
    assert told["machine"]["versions"] == 'python "stub"'
    ended = {stage["stage"]: (stage["outcome"], stage["status"]) for stage in told["stages"]}
    assert ended["device"] == ("ok", 0)
    assert ended["build"] == ("failed", 3)
    assert ended["table-cuda"][0].startswith("out of its")
    assert ended["device-tests"] == ("no time left", 124)
    assert "the compiler broke" in log


def test_a_stage_that_does_not_exist_has_not_passed(tmp_path):
    status, told, log = run(tmp_path, ONLY="device tabel-cuda")
    assert (status, told["outcome"]) == (1, "failed")
    assert "failed: tabel-cuda (unknown)" in log


def test_so_is_what_is_missing(tmp_path):
    status, told, log = run(tmp_path, PYTHON="/nonexistent/python")
    assert status == 1
    assert told["outcome"].startswith("not started")
    assert "the Python package torch" in told["missing"]
    assert "the Python package torch is missing" in log
