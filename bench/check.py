"""``python -m bench.check``: a guard against regressions, by ratios to plain PyTorch measured in one run.

The least ratios are far below what the kernels reach (see the README's table), so that a busy machine passes and a
kernel that lost its point does not.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench import work
from bench.cases import CASES, OPS
from bench.rivals import BASELINE, CONTENDERS, ours
from bench.timer import interleave

#: The least ratio to the baseline on each kind of device.
LEAST = {
    "cpu": {
        ("fnac_loss", "b32-7x7"): 0.9,
        ("fnac_loss", "published"): 1.4,
        ("fnac_loss", "b512-7x7"): 1.7,
        ("fnac_loss", "b128-14x14"): 1.5,
        ("max_logits", "published"): 1.3,
    },
    "cuda": {
        ("fnac_loss", "published"): 1.0,
        ("fnac_loss", "b1024-7x7"): 0.9,
        ("fnac_loss", "b128-14x14"): 1.0,
    },
}


def ratio(op: str, case: str, backend: str, device: str) -> float:
    """How many times faster than the baseline, after the results were found equal."""
    inputs = work.leaves(OPS[op], CASES[case], device)
    exact = work.oracle(OPS[op], inputs)
    steps = {}
    for name in (BASELINE, backend):
        steps[name] = work.step(OPS[op], CONTENDERS[name], inputs, torch.float32)
        error = work.error(steps[name](), exact)
        if not error.acceptable(torch.float32):
            raise SystemExit(f"{op} {case}: {name} differs from the reference: {error}")
    timings = interleave(steps, device, seconds=5.0)
    return timings[BASELINE].p50 / timings[backend].p50


def main() -> int:
    argparse.ArgumentParser(prog="python -m bench.check", description=__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    slow = 0
    for (op, case), least in LEAST[device].items():
        for name in ours(device):
            got = ratio(op, case, name, device)
            slow += got < least
            verdict = "ok" if got >= least else "TOO SLOW"
            print(f"{op:<12}{case:<14}{name:<8}{got:6.2f} x {BASELINE}, at least {least}: {verdict}", flush=True)
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
