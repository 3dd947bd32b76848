"""The benchmark harness: it times what it says, refuses wrong results, and reports what does not fit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
import time
import types

import pytest
import torch

import bench.distributed
import bench.training_step
import fnac_kernels
from bench import limits, memory, work
from bench.__main__ import arguments, measure, selected
from bench.cases import CASES, OPS, ChunkedReference
from bench.results import Row, Run
from bench.rivals import BASELINE, CONTENDERS, Contender
from bench.timer import interleave
from fnac.model import AudioVisualModel
from fnac_kernels import reference

TINY = CASES["tiny"]


def test_the_timer_alternates_and_orders_by_duration():
    calls = []

    def sleeper(name, seconds):
        def step():
            calls.append(name)
            time.sleep(seconds)

        return step

    timings = interleave({"short": sleeper("short", 0.003), "long": sleeper("long", 0.03)}, rounds=4)
    turns = calls[2:]  # the first two find the number of repeats
    assert all(set(turns[i : i + 2]) == {"short", "long"} for i in range(0, 8, 2))
    assert 3 <= timings["short"].p20 <= timings["short"].p50 <= timings["short"].p80
    assert timings["short"].p50 < timings["long"].p50
    assert timings["long"].rounds == 4


def test_every_step_follows_every_other_and_runs_have_the_same_orders():
    def orders() -> list[str]:
        calls = []
        interleave({name: lambda name=name: calls.append(name) or time.sleep(0.002) for name in "abc"}, rounds=30)
        return [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]

    first = orders()
    assert set(itertools.pairwise(first)) == {(a, b) for a in "abc" for b in "abc" if a != b}
    assert orders() == first


def test_the_timer_stops_when_its_time_is_over_but_not_before_three_rounds():
    assert interleave({"step": lambda: time.sleep(0.01)}, rounds=50, seconds=0.0)["step"].rounds == 3


def test_short_calls_are_repeated_within_a_sample():
    calls = []
    interleave({"step": lambda: calls.append(0)}, rounds=3)
    assert len(calls) > 3 * 100


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_every_contender_that_can_run_agrees_with_the_reference(op):
    case = CASES["tiny"] if op.problem(TINY) is None else CASES["tiny-1x1"]
    inputs = work.leaves(op, case, "cpu")
    exact = work.oracle(op, inputs)
    for contender in CONTENDERS.values():
        if contender.name != "compile" and contender.problem(op, case, "cpu") is None:
            error = work.error(work.step(op, contender, inputs, torch.float32)(), exact)
            assert error.acceptable(contender.products), f"{contender.name}: {error}"


@pytest.mark.parametrize("op", ["fnac_loss", "max_logits"])
def test_the_chunked_reference_is_the_reference(op, monkeypatch):
    monkeypatch.setattr("bench.cases.CHUNK", 3 * TINY.m * TINY.cells)  # several chunks, the last one smaller
    inputs = work.leaves(OPS[op], TINY, "cpu")
    whole = Contender("reference", lambda op, x: lambda: op.run(reference, *x))
    error = work.error(work.oracle(OPS[op], inputs), work.step(OPS[op], whole, inputs, torch.float32)())
    assert error.value < 1e-6
    assert error.grad < 1e-6
    assert ChunkedReference.paired_maps is reference.paired_maps


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_result_is_not_acceptable(factor):
    op = OPS["max_logits"]
    inputs = work.leaves(op, TINY, "cpu")
    wrong = Contender("wrong", lambda op, x: lambda: (factor * reference.max_logits(*x, 0.03),))
    error = work.error(work.step(op, wrong, inputs, torch.float32)(), work.oracle(op, inputs))
    assert not error.acceptable(torch.float32)


def test_the_memory_meter_sees_the_similarity_tensor_and_the_limit():
    case = CASES["wide"]
    tensor = case.n * case.m * case.cells * 4

    def peak(contender, size):
        return memory.peak("max_logits_forward", case.name, contender, torch.float32, "cpu", size)

    assert tensor < peak(BASELINE, memory.GIB) < 3 * tensor
    with pytest.raises(memory.OutOfMemory):
        peak(BASELINE, tensor // 2)


def test_the_memory_meter_has_the_threads_and_the_precision_of_the_run(monkeypatch):
    class Process:  # in this one, which a fresh one's settings are given first
        def __init__(self, target, args):
            self.start = lambda: (torch.set_num_threads(1), target(*args))
            self.join = lambda: None

    def note(*_):
        return lambda: seen.append((torch.get_num_threads(), torch.get_float32_matmul_precision()))

    context = types.SimpleNamespace(Process=Process, Pipe=multiprocessing.Pipe, set_forkserver_preload=list)
    monkeypatch.setattr(memory.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(memory, "step", note)
    seen, before = [], (torch.get_num_threads(), torch.get_float32_matmul_precision())
    try:
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("high")
        memory.peak("max_logits", TINY.name, "cpu", torch.float32, "cpu", memory.GIB)
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
    assert set(seen) == {(3, "high")}


def test_the_limit_counts_the_work():
    op, case = OPS["max_logits_forward"], CASES["published"]
    peaks = {"gemm_float32": 0.9e12, "fma": 1e12, "gemm_bfloat16": 4e12, "copy": 1e15}
    flops = 2 * 256 * 256 * 49 * 512
    assert limits.seconds(op, case, torch.float32, peaks) == pytest.approx(flops / 1e12)
    assert limits.seconds(op, case, torch.bfloat16, peaks) == pytest.approx(flops / 4e12)
    peaks["gemm_bfloat16"] = 1e9  # no instructions for it
    assert limits.seconds(op, case, torch.bfloat16, peaks) == pytest.approx(flops / 1e12)
    peaks["copy"] = 1.0
    assert limits.seconds(op, case, torch.float32, peaks) == pytest.approx(4 * 256 * 49 * 512)


def test_results_survive_the_round_trip(tmp_path):
    run = Run(
        {"device": "x"}, {"rounds": 3}, {"fma": 1.23456e12}, [Row("fnac_loss", "tiny", "float32", "cpu", p50=1.0)]
    )
    run.write(tmp_path / "run.json")
    again = Run.read(tmp_path / "run.json")
    assert again.rows == run.rows
    assert again.peaks == {"fma": 1.235e12}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_the_command_measures_and_writes(tmp_path):
    out = tmp_path / "run.json"
    command = ["--cases", "tiny", "--backends", "cpu", "--rounds", "3", "--no-memory", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "bench", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {BASELINE, "cpu"}
    assert rows["cpu"]["status"] == "ok"
    assert rows["cpu"]["ratio"] == pytest.approx(rows[BASELINE]["p50"] / rows["cpu"]["p50"], rel=1e-2)


def test_a_case_for_which_nobodys_memory_suffices_is_a_result(monkeypatch):
    def prepare(op, inputs):
        raise MemoryError("too large")

    monkeypatch.setitem(CONTENDERS, BASELINE, Contender(BASELINE, prepare))
    options = arguments().parse_args(["--device", "cpu", "--backends", BASELINE, "--no-memory"])
    (row,) = measure(OPS["fnac_loss"], TINY, "float32", options, {})
    assert (row.status, row.detail) == ("out of memory", "MemoryError: too large")


def test_the_command_names_a_case_that_an_operation_cannot_do():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--ops", "fnac_loss", "--cases", "tall"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "tall: pairs every image with a sound" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--rounds", "0", "is 0; it should be at least 1"),
        ("--threads", "-2", "is -2; it should be at least 1"),
        ("--memory-limit", "0", "is 0; it should be positive and finite"),
        ("--memory-limit", "nan", "is nan; it should be positive and finite"),
        ("--out", ".", "is ., a folder; it should name a file"),
        ("--out", "/dev/null/run.json", "whose folder cannot be made"),
        ("--out", "/proc/run.json", "or written to"),
    ],
)
def test_what_cannot_be_measured_with_is_refused_at_once(flag, value, why, capsys):
    with pytest.raises(SystemExit):
        arguments().parse_args([flag, value])
    assert f"argument {flag}: " in (refusal := capsys.readouterr().err)
    assert why in refusal


def test_what_an_operation_cannot_do_is_left_out_and_named(capsys):
    options = arguments().parse_args(["--ops", "fnac_loss", "max_logits", "--cases", "tall"])
    assert [(op.name, case.name) for op, case in selected(options)] == [("max_logits", "tall")]
    assert capsys.readouterr().err == "left out: fnac_loss on tall: pairs every image with a sound: needs n == m\n"


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_what_processes_share_is_not_timed_when_it_differs(wrong, tmp_path, monkeypatch):
    """The loss or a gradient: here of one process, whose loss a factor makes wrong."""

    def loss(img, aud, tau, *, backend):
        out = fnac_kernels.fnac_loss(img, aud, tau, backend=backend)
        if backend == "reference":
            return out
        factor = 1.1 if wrong == "value" else 1.0
        return out._replace(loss=factor * out.loss + (img - img.detach()).sum())

    monkeypatch.setattr(fnac_kernels, "distributed_fnac_loss", loss)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit, match="tiny: cpu differs from eager"):
            bench.distributed.measure(TINY, torch.device("cpu"), 1)
    finally:
        torch.distributed.destroy_process_group()


def test_results_to_be_measured_again_have_a_name_that_is_known():
    script = bench.distributed.__file__.replace("distributed.py", "measure.sh")
    done = subprocess.run(["bash", script, "nowhere", "1-bach"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "measure.sh: failed: 1-bach (unknown)\n")


@pytest.mark.parametrize("wrong", [False, True])
def test_a_training_step_whose_loss_differs_is_not_timed_and_told(wrong, tmp_path, monkeypatch):
    out = tmp_path / "step.json"
    small = ["--batch=4", "--size=64", "--device=cpu", "--rounds=1", "--seconds=0.01", f"--out={out}"]
    monkeypatch.setattr("sys.argv", ["training_step", *small])
    if wrong:

        def loss(*inputs, **settings):
            return fnac_kernels.functional.fnac_loss(*inputs, **settings)._replace(loss=inputs[0].sum())

        monkeypatch.setattr(fnac_kernels, "fnac_loss", loss)
    assert bench.training_step.main() == wrong
    rows = {row.contender: row for row in Run.read(out).rows}
    assert {
        name: row.status for name, row in rows.items() if row.contender in ("cpu", bench.training_step.DEFAULTS)
    } == (dict.fromkeys(("cpu", bench.training_step.DEFAULTS), "differs" if wrong else "ok"))
    assert rows["eager"].p50 is not None
    assert (rows["cpu"].p50 is None) == wrong


@pytest.mark.parametrize("size", [40, 64])
def test_a_training_step_is_named_by_its_maps(size):
    maps = AudioVisualModel()(torch.zeros(2, 3, size, size), torch.zeros(2, 1, 257, 200))[0]
    assert maps.shape[-1] == bench.training_step.side(size)


def test_a_batch_that_processes_share_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("FNAC_CPU_ISA", "portable")
    out = tmp_path / "run.json"
    command = [sys.executable, "-m", "bench.distributed", "--device", "cpu", "--cases", "tiny", "--rounds", "3"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == [BASELINE, "cpu", "one process"]
    assert {(row["op"], row["case"], row["rounds"]) for row in rows} == {
        ("distributed_fnac_loss", "tiny, 2 processes, portable", 3)
    }
    refused = subprocess.run([*command, "--processes", "1"], capture_output=True, text=True)
    assert "--processes is 1; it should be at least 2" in refused.stderr
    refused = subprocess.run([*command, "--processes", "9"], capture_output=True, text=True)
    assert "--processes is 9; tiny has 8 pairs to share" in refused.stderr
