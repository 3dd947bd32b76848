"""The command's process keeps freed memory; each case in a process of its own, for the setting is the process's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# Prints whether memory is kept, and the page faults of filling 100 MB once more. Not the second time: glibc finds a
# freed block too small for its like, by the alignment, until two lie side by side.
FILLS = """
import resource
import torch
from fnac.memory import keep_freed_memory
print(keep_freed_memory())
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def last_fill(**environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FILLS], env=clean | environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_what_was_freed_is_used_again():
    kept, faults = last_fill()
    assert kept == "True"
    assert faults < 100


@pytest.mark.parametrize("environment", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=4096"}])
def test_an_environment_that_sets_malloc_is_left_alone(environment):
    kept, _ = last_fill(**environment)
    assert kept == "False"


def test_the_command_keeps_memory():
    script = (
        "import sys, fnac.memory; fnac.memory.keep_freed_memory = lambda: print('kept'); sys.argv = ['fnac', '--help'];"
        "from fnac.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kept")
