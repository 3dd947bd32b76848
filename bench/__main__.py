"""``python -m bench``: parity, memory and time of every contender on chosen cases, as a table and as JSON."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator

import torch

from bench import flags, limits, machine, memory, rivals, work
from bench.cases import CASES, DEFAULT, OPS, Case, Op
from bench.report import table
from bench.results import Row, Run, conditions
from bench.timer import interleave
from fnac.memory import keep_freed_memory


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=rivals.CONTENDERS,
        metavar="CONTENDER",
        default=list(rivals.CONTENDERS),
        help=f"who runs, the baseline {rivals.BASELINE} always among them: of {', '.join(rivals.CONTENDERS)}",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        default=["float32"],
        help="below float32: autocast of float32 features, for everyone",
    )
    parser.add_argument("--matmul-precision", choices=("highest", "high", "medium"), default="highest")
    flags.add_device(parser)
    parser.add_argument("--threads", type=flags.count, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=flags.count, default=25, help="samples of each contender, at most")
    parser.add_argument("--seconds", type=flags.positive, default=8.0, help="time for the samples of a case")
    parser.add_argument(
        "--memory-limit", type=flags.positive, default=8.0, help="GiB a call may need beyond its inputs"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="in a process that keeps freed memory, as the fnac command's does"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory, a fresh process per row")
    parser.add_argument("--out", type=flags.output, help="write the results here, as JSON")
    return parser


def selected(options: argparse.Namespace) -> list[tuple[Op, Case]]:
    """The operations and cases asked for; one of the two alone is combined with the other's defaults."""
    ops = options.ops or (["fnac_loss"] if options.cases else list(DEFAULT))
    pairs = [(OPS[op], CASES[case]) for op in ops for case in options.cases or DEFAULT.get(op, ("published",))]
    refused = [f"{op.name} on {case.name}: {problem}" for op, case in pairs if (problem := op.problem(case))]
    if len(refused) == len(pairs):
        raise SystemExit("\n".join(refused))
    print(*(f"left out: {reason}" for reason in refused), sep="\n", end="\n" * bool(refused), file=sys.stderr)
    return [(op, case) for op, case in pairs if op.problem(case) is None]


def measure(op: Op, case: Case, dtype: str, options: argparse.Namespace, peaks: dict[str, float]) -> Iterator[Row]:
    """A row per contender: first who can and who fits, then who agrees, and only then how long it takes."""
    precision = getattr(torch, dtype)
    names = [name for name in rivals.CONTENDERS if name in (rivals.BASELINE, *options.backends)]
    if dtype != "float32":  # where products are of 16 bits anyway
        names = [name for name in names if rivals.CONTENDERS[name].products == torch.float32]
    full = case.name + conditions(options.keep_memory)
    rows = {name: Row(op.name, full, dtype, name) for name in names}
    inputs = work.leaves(op, case, options.device)
    exact = work.oracle(op, inputs)
    size = round(options.memory_limit * memory.GIB)
    steps = {}
    for name, row in rows.items():
        contender = rivals.CONTENDERS[name]
        problem = contender.problem(op, case, options.device)
        if problem is not None:
            row.status, row.detail = "not run", problem
            continue
        try:
            if not options.no_memory:
                row.peak_bytes = memory.peak(op.name, case.name, name, precision, options.device, size)
            with memory.limited(options.device, size):
                run = work.step(op, contender, inputs, precision)
                error = work.error(run(), exact)
        except Exception as failure:  # a rival's failure is a result
            row.status = "out of memory" if memory.is_exhaustion(failure) else "failed"
            row.detail = f"{type(failure).__name__}: {failure}".splitlines()[0]
            continue
        row.value_error, row.grad_error = error.value, error.grad
        if error.acceptable(contender.judged(precision)):
            steps[name] = run
        else:
            row.status, row.detail = "differs", "gives another result than the reference: not timed"
    timings = interleave(steps, options.device, rounds=options.rounds, seconds=options.seconds) if steps else {}
    base = timings.get(rivals.BASELINE)
    for name, timing in timings.items():
        row = rows[name].timed(timing, base)
        row.fraction = limits.seconds(op, case, rivals.CONTENDERS[name].judged(precision), peaks) / (timing.p50 / 1e3)
    yield from rows.values()


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    if options.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: this C library, or the environment, decides otherwise")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    warnings.filterwarnings("ignore", module="torch")
    pairs = selected(options)
    kept = ("matmul_precision", "threads", "rounds", "seconds", "memory_limit", "keep_memory")
    settings = {key: getattr(options, key) for key in kept}
    run = Run(machine.facts(options.device), settings, machine.peaks(options.device), [])
    print(", ".join(f"{name} {value / 1e9:.0f} G/s" for name, value in run.peaks.items()), flush=True)
    for op, case in pairs:
        for dtype in options.dtypes:
            rows = list(measure(op, case, dtype, options, run.peaks))
            run.rows += rows
            print(f"\n{op.name} ({op.what}), {case.name}, {dtype}\n{table(rows)}", flush=True)
            if options.out:
                run.write(options.out)
    return int(any(row.status in ("differs", "failed") for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
