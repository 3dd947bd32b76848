"""The default cases as a pytest-benchmark suite: ``pytest bench -k "published and fnac_loss"``.

It takes one contender after the other; for ratios of interleaved runs use ``python -m bench``.
"""

from __future__ import annotations

import pytest
import torch

from bench import work
from bench.cases import CASES, DEFAULT, OPS
from bench.rivals import CONTENDERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in DEFAULT.items() for case in cases])
def test_op(benchmark, op, case, contender):
    problem = CONTENDERS[contender].problem(OPS[op], CASES[case], DEVICE)
    if problem is not None:
        pytest.skip(problem)
    inputs = work.leaves(OPS[op], CASES[case], DEVICE)
    step = work.step(OPS[op], CONTENDERS[contender], inputs, torch.float32)
    error = work.error(step(), work.oracle(OPS[op], inputs))
    assert error.acceptable(CONTENDERS[contender].products), error

    def finished() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {case}"
    benchmark.pedantic(finished, rounds=7, warmup_rounds=1)
