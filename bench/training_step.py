"""``python -m bench.training_step``: how much of a training step (two ResNet-18, an optimizer) the loss is.

At the published setting the encoders take nearly all of the time; this says so in milliseconds.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fnac_kernels
from bench import flags, machine, rivals
from bench.cases import TAU
from bench.report import table
from bench.results import Row, Run, conditions
from bench.timer import interleave
from fnac.memory import keep_freed_memory
from fnac.model import AudioVisualModel
from fnac.training import fast_precision
from fnac_kernels import reference

#: The encoders alone, with a gradient of ones: what the loss cannot change.
WITHOUT_LOSS = "no loss"
#: As ``fnac fit`` trains by default: channels_last, one pass of Adam, bfloat16 autocast where the machine has it.
DEFAULTS = "fnac's defaults"


def training_step(
    loss: Callable[[Tensor, Tensor], Tensor], model: nn.Module, *batch: Tensor, defaults: bool = False
) -> Callable[[], Tensor]:
    """One step of Adam, in float32 and NCHW as the official code, or with ``defaults`` as ``fnac fit``."""
    model = copy.deepcopy(model)
    if defaults:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = (batch[0].contiguous(memory_format=torch.channels_last), *batch[1:])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=defaults)
    rounded = defaults and fast_precision() == "bf16-mixed"
    autocast = torch.autocast(batch[0].device.type, torch.bfloat16, enabled=rounded)

    def run() -> Tensor:
        optimizer.zero_grad()
        with autocast:
            value = loss(*model(*batch))
        value.backward()
        optimizer.step()
        return value.detach()

    return run


def losses(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def of(library: Any, **backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda img, aud: library.fnac_loss(img, aud, TAU, **backend).loss

    return {
        rivals.BASELINE: of(reference),
        **{name: of(fnac_kernels, backend=name) for name in rivals.ours(device)},
        WITHOUT_LOSS: lambda img, aud: img.sum() + aud.sum(),
    }


def side(size: int) -> int:
    """Cells along an edge of an image's map: each of the encoder's five strides rounds up."""
    return -(-size // 32)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training_step", description=__doc__)
    parser.add_argument("--batch", type=flags.count, default=64)
    parser.add_argument("--size", type=flags.count, default=224, help="image height and width")
    flags.add_device(parser)
    parser.add_argument("--rounds", type=flags.count, default=7)
    parser.add_argument("--seconds", type=flags.positive, default=900.0)
    parser.add_argument(
        "--keep-memory", action="store_true", help="in a process that keeps freed memory, as the fnac command's does"
    )
    parser.add_argument("--out", type=flags.output, help="write the results here, as JSON")
    options = parser.parse_args()
    if options.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: this C library, or the environment, decides otherwise")
    torch.manual_seed(0)
    model = AudioVisualModel(image_dropout=0.0).to(options.device)
    batch = (
        torch.randn(options.batch, 3, options.size, options.size, device=options.device),
        torch.randn(options.batch, 1, 257, 200, device=options.device),
    )
    contenders = losses(options.device)
    steps = {name: training_step(loss, model, *batch) for name, loss in contenders.items()}
    # What the loss is, of the encoders in float32 and, where they round, of those that do.
    plain = contenders[rivals.BASELINE]
    exact = {rounded: training_step(plain, model, *batch, defaults=rounded) for rounded in (False, True)}
    steps[DEFAULTS] = training_step(lambda i, a: fnac_kernels.fnac_loss(i, a, TAU).loss, model, *batch, defaults=True)
    case = f"b{options.batch}-{side(options.size)}x{side(options.size)}" + conditions(options.keep_memory)
    rows = {name: Row("training_step", case, "float32", name) for name in steps}
    wanted = {rounded: step().item() for rounded, step in exact.items()}
    for name in [*steps]:
        value, rounded = steps[name]().item(), name == DEFAULTS
        close = abs(value - wanted[rounded]) <= (2e-2 if rounded else 1e-4) * abs(value)  # which a NaN is not
        if name != WITHOUT_LOSS and not close:
            rows[name].status = "differs"
            rows[name].detail = f"gives a loss of {value:.6g}, plain PyTorch {wanted[rounded]:.6g}: not timed"
            del steps[name]
    timings = interleave(steps, options.device, rounds=options.rounds, seconds=options.seconds)
    for name, timing in timings.items():
        rows[name].timed(timing, timings.get(rivals.BASELINE))
    print(f"a training step, batch {options.batch}, {options.size}x{options.size} images\n{table([*rows.values()])}")
    if options.out:
        settings = {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "threads": torch.get_num_threads(),
            "keep_memory": options.keep_memory,
        }
        Run(machine.facts(options.device), settings, {}, [*rows.values()]).write(options.out)
    return int(any(row.status == "differs" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
