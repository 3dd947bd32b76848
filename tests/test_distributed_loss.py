"""The loss of a batch that processes share equals the loss of the batch in one process: values and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from processes import CASES, NCE_ALONE, PAIRS_SETTINGS, TWELVE, WORLD, Encoders, far_from_zero, step, trained, work
from tolerance import Run, assert_as_good_as_torch

import fnac_kernels as fk
from fnac_kernels import _distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def together(found) -> Run:
    """The processes' results as those of one; they agree on the terms."""
    for rank in found:
        for term, first in zip(rank["outputs"][:-1], found[0]["outputs"][:-1], strict=True):
            assert torch.equal(term, first)
    maps = torch.cat([rank["outputs"][-1] for rank in found])
    dimg, daud = (None if found[0][x] is None else torch.cat([rank[x] for rank in found]) for x in ("dimg", "daud"))
    return Run((*found[0]["outputs"][:-1], maps), dimg, daud)


def alone(name, backend, dtype) -> Run:
    """The case in one process."""
    return Run(**step(dataclasses.replace(CASES[name], backend=backend, dtype=dtype), slice(None), fk.fnac_loss))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_process(ranks, name):
    case = CASES[name]
    got, exact = together([rank[name] for rank in ranks]), alone(name, "reference", torch.float64)
    if case.dtype == torch.float64:
        for x, y in zip((*got.outputs, got.dimg, got.daud), (*exact.outputs, exact.dimg, exact.daud), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)
    else:
        assert_as_good_as_torch(got, alone(name, "reference", None), exact, case.sample.dtype)


def test_logits_far_from_zero_keep_the_digits_of_their_softmaxes(ranks):
    img, aud = far_from_zero(torch.float64)
    fk.fnac_loss(img, aud, 1.0, **NCE_ALONE).loss.backward()
    for i, exact in enumerate((img.grad, aud.grad)):
        got = torch.cat([rank["far from zero"][i] for rank in ranks]).double()
        assert float((got - exact).norm() / exact.norm()) < 3e-3


def test_without_gradients_the_values_are_the_same(ranks):
    img, aud = TWELVE.features()
    for rank in ranks:
        torch.testing.assert_close(rank["no_grad"][:-1], tuple(fk.fnac_loss(img, aud)[:-1]), rtol=1e-4, atol=1e-4)


def test_autocast_rounds_as_in_one_process(ranks):
    with torch.autocast("cpu", torch.bfloat16):
        expected = fk.fnac_loss(*TWELVE.features())
    for rank in ranks:
        torch.testing.assert_close(rank["autocast"][:-1], tuple(expected[:-1]), rtol=1e-4, atol=1e-4)


def test_it_runs_in_compiled_code(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["compiled"], rank["twice as large"])


def test_a_group_of_some_processes_shares_among_them(ranks):
    img, aud = (x.requires_grad_() for x in TWELVE.features())
    expected = fk.fnac_loss(img, aud, **PAIRS_SETTINGS)
    expected.loss.backward()
    for rank, rows in ((0, slice(0, 5)), (2, slice(5, 12))):
        wanted = (*(x.detach() for x in expected[:-1]), img.grad[rows], aud.grad[rows])
        torch.testing.assert_close(ranks[rank]["pair"], wanted, rtol=1e-4, atol=1e-4)
    assert "process_group does not contain this process" in ranks[1]["outside"]


def test_averaged_gradients_of_parameters_are_those_of_the_loss(ranks):
    for rank in ranks:
        for got, expected in zip(rank["trained"], trained(Encoders(), fk.FNACLoss()), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_processes_that_differ_all_say_in_what(ranks):
    expected = [
        "the processes have different tau: 0.1, 1.1, 2.1 by rank; they should have the same",
        "the processes have different weights: 5, 4, 4 by rank; they should have the same",
        "the processes have different adjacency_threshold: 0.5, None, None by rank; they should have the same",
        "the processes have different numbers of channels: 9, 8, 8 by rank; they should have the same",
        "the processes have different dtypes: torch.float16, torch.bfloat16, torch.bfloat16 by rank; they should have "
        "the same",
        "the processes have different requires_grad of aud: True, False, True by rank; they should have the same",
        "the processes have different requires_grad of img: False, False, True by rank; they should have the same",
    ]
    assert [rank["errors"] for rank in ranks] == [expected] * WORLD


def test_numbers_that_differ_are_shown_as_different():
    assert _distributed._shown("tau", 0.0300000001) == "0.0300000001"
    assert _distributed._shown("numbers of channels", 512.0) == "512"


def test_one_process_needs_no_group():
    img, aud = TWELVE.features()
    for got, expected in zip(fk.distributed_fnac_loss(img, aud), fk.fnac_loss(img, aud), strict=True):
        assert torch.equal(got, expected)


def test_a_group_without_distributed_is_an_error():
    with pytest.raises(ValueError, match="process_group is given; distributed should then be True"):
        fk.FNACLoss(process_group=object())
