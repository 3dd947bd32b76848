"""``python tests/triton_resources.py > tests/data/triton_resources.txt``: what every Triton kernel costs on each chip.

Kernels are compiled ahead of time, which needs no GPU; registers, stack and shared memory are read from the binary with
the cuobjdump that comes with Triton. Stack is where spilled registers go. ``programs`` is how many fit on a
multiprocessor, ``warps`` how many warps that makes.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cubin
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.tuning import TABLE, Blocks

#: Kilobytes of shared memory a multiprocessor, and threads.
CHIPS = {80: (164, 2048), 86: (100, 1536), 90: (228, 2048), 100: (228, 2048)}
#: Maps that lead to every variant there is: of up to 16, 32, 64, 128, 256 and of more cells, with last tiles of 16, 32
#: and 64, and where rows of NCHW are whole 16-byte loads and where not. A test looks for others.
CELLS = (49, 196, 4, 9, 16, 25, 32, 64, 80, 81, 100, 256, 289, 529, 576, 784)
DTYPES = ("fp32", "bf16", "fp16")
#: The table's parts, in its order.
PARTS = tuple(itertools.product(CHIPS, DTYPES))
SIZES = (
    "N", "M", "C", "P", "count", "stride_c", "stride_p", "images", "splits", "slots", "tiles", "row0", "rows", "width"
)  # fmt: skip
NUMBERS = ("scale", "threshold", "w0", "w1", "w2", "w3")
DISTANCES = {"S1": True, "S2": True, "S3": True}
TERMS = {"NCE": True, **DISTANCES, "MASKED": True}
GRADIENTS = {"LOSS": True, "TERMS": True}
NCHW, CHANNELS_LAST = {"stride_p": 1}, {"stride_c": 1}


class Variant(NamedTuple):
    """A kernel as it is launched: its tile sizes, the arguments that are constants, sizes divisible by 16 besides C,
    and whether an argmax takes two bytes.
    """

    name: str
    kernel: Any
    blocks: Blocks
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    wide: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Variants of equal keys are the same code."""
        constants = tuple(sorted((name, str(value)) for name, value in self.constants.items()))
        return self.kernel.__name__, self.blocks.key, constants, self.aligned, self.wide


class Cost(NamedTuple):
    """A row of the table."""

    capability: int
    dtype: str
    kernel: str
    registers: int
    stack: int
    shared: int
    programs: int
    warps: int
    tensor_cores: str


def _module(name: str) -> Any:
    return importlib.import_module(f"fnac_kernels.backends.triton.{name}")


def variants(capability: int, dtype: str, maps: tuple[int, ...] = CELLS) -> list[Variant]:
    """The kernels that read features of this dtype, each variant once; with float32 also those that read none.

    What differs between float16 and bfloat16 is an instruction's type: float16 has one map, but for the gradient of the
    images, which is multiplied in float32.
    """
    found: dict[tuple[Any, ...], Variant] = {}
    for cells in maps:
        for variant in of_maps(capability, dtype, cells):
            if dtype != "fp16" or cells == maps[0] or variant.name.startswith("image_gradient"):
                found.setdefault(variant.key, variant)
    for variant in of_pairs(capability, dtype):
        found.setdefault(variant.key, variant)
    return list(found.values())


def _precisions(dtype: str) -> tuple[tuple[str, dict[str, str]], ...]:
    """How products of this dtype are made, with what tells them apart in a name."""
    exact, medium = ("", {"PRECISION": "tf32x3"}), (" medium", {"PRECISION": "tf32"})
    return (exact, medium) if dtype == "fp32" else (("", {"PRECISION": "tf32"}),)


def of_maps(capability: int, dtype: str, cells: int) -> Iterator[Variant]:
    """The kernels whose tiles are fitted to a map, and those that read one."""
    table, wide = TABLE[capability], cells > 256
    logits, pooling = _module("max_logits").max_logits_kernel, _module("pooling")
    gradient, audio = _module("image_gradient").image_gradient_kernel, _module("audio_gradient")
    product = {"PRODUCT": tl.bfloat16 if dtype == "bf16" else tl.float32}
    everything = {"LOGITS": True, "MAPS": True, "AVG": True, "FOREGROUND": True, **product}
    for name in ("max_logits_float32",) if dtype == "fp32" else ("max_logits", "max_logits_small"):
        blocks = tuning.fit_max_logits(table[name], cells)
        for how, precision in _precisions(dtype):
            yield Variant(f"{name} {cells}{how}", logits, blocks, precision, wide=wide)
    turned = ("P",) if cells % 16 == 0 else ()
    yield Variant(f"rows {cells}", _module("rows").rows_kernel, tuning.rows(cells), {}, turned)
    nchw_rows = () if cells % 16 else ("stride_c",)
    for layout, stride, aligned in (("nchw", NCHW, nchw_rows), ("nhwc", CHANNELS_LAST, ("stride_p",))):
        where = f"{layout} {cells}"
        whole = tuning.whole_image(cells)
        if whole is None:
            blocks = tuning.part_of_image(cells)
            yield Variant(f"pool {where}", pooling.pool_kernel, blocks, {**stride, "AVG": True}, aligned)
        else:
            constants = {**stride, "MAPS": True, "AVG": True}
            yield Variant(f"image {where}", pooling.image_kernel, whole, constants, aligned)
        yield Variant(f"map {where}", pooling.map_kernel, tuning.part_of_image(cells), stride, aligned)
        bfloat16 = ("image_gradient", "image_gradient_small")
        for name in bfloat16 if dtype == "bf16" else ("image_gradient_float32",):
            blocks = tuning.fit_image_gradient(table[name], cells)
            for how, precision in _precisions(dtype):
                constants = everything | precision | stride
                yield Variant(f"{name} {where}{how}", gradient, blocks, constants, aligned, wide)
        constants = {**stride, "MAPS": True, "AUD": True}
        yield Variant(
            f"audio_gradient {where}", audio.audio_gradient_kernel, tuning.audio_gradient(), constants, aligned
        )
    share = audio.audio_share_kernel
    if dtype == "bf16" and cells <= audio.GATHER_CELLS:
        blocks = tuning.fit_audio_share(table["audio_share"], cells)
        yield Variant(f"audio_share {cells}", share, blocks, {"GATHER": False, **product, "PRECISION": "tf32"})
    # No products: the precision changes nothing.
    blocks = table["audio_share_gather"]
    constants = {"GATHER": True, **product, "PRECISION": "tf32"}
    yield Variant(f"audio_share_gather {cells}", share, blocks, constants, wide=wide)


def of_pairs(capability: int, dtype: str) -> Iterator[Variant]:
    """The kernels of the contrastive and adjacency terms, of which none depends on the map."""
    table, wide = TABLE[capability], dtype == "fp32"
    forward, backward, rows = _module("adjacency"), _module("adjacency_backward"), tuning.adjacency_rows()
    suffix, product = "_float32" if wide else "", {"PRECISION": "tf32x3" if wide else "tf32"}
    for size in ("", "_small"):
        tile = table[f"adjacency{size}"]
        pair, feature = (table[f"adjacency_{name}{size}{suffix}"] for name in ("weights", "features"))
        # Rows of N values are read 16 bytes at a time where N allows it.
        for ragged, aligned in ((" ragged", ()), ("", ("N",))):
            # Forward products are of means, float32 whatever the features are.
            where, exact = f"{size}{ragged}", {"PRECISION": "tf32x3"}
            yield Variant(f"statistics{where}", forward.statistics_kernel, tile, TERMS | exact, aligned)
            yield Variant(f"distances{where}", forward.distances_kernel, tile, DISTANCES | exact, aligned)
            weights = TERMS | GRADIENTS | {"PARTS": 1 if wide else 2} | product
            yield Variant(f"weights{where}", backward.weights_kernel, pair, weights, aligned)
        parts = {"PARTS": 1 if wide else 2, "AUD_PARTS": 2 if dtype == "fp16" else 1}
        yield Variant(f"features{size}", backward.features_kernel, feature, DISTANCES | parts | product)
    if not wide:
        yield Variant("parts", _module("parts").parts_kernel, tuning.elements(), {})
        return
    yield Variant("collect", forward.collect_kernel, rows, TERMS)
    yield Variant("finish", forward.finish_kernel, rows, {"NCE": True, **DISTANCES})


def compiled(capability: int, dtype: str, variant: Variant) -> Any:
    """Compile with the divisibility of C = 512 and of allocated tensors."""
    constants = variant.constants | variant.blocks.sizes
    features = f"*{dtype}"
    pointers = dict.fromkeys(("img", "aud", "dimg", "daud", "copy"), features)
    pointers |= {"argmax": "*u16" if variant.wide else "*u8", "mask": "*i8"}
    if variant.kernel.__name__ == "features_kernel":
        pointers["daud"] = "*fp32"
    if variant.constants.get("PARTS") == 2:
        pointers |= dict.fromkeys(("avg", "fore", "pair_weights"), "*bf16")
        pointers["aud"] = "*bf16" if variant.constants.get("AUD_PARTS") == 2 else features
    if variant.kernel.__name__ == "parts_kernel":
        pointers = {"z": features, "out": "*bf16"}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        return "i32" if argument in SIZES else "fp32" if argument in NUMBERS else pointers.get(argument, "*fp32")

    signature = {argument: kind(argument) for argument in variant.kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, type_) in enumerate(signature.items())
        if type_.startswith("*") or argument in ("C", "width", *variant.aligned)
    }
    return triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: value for name, value in variant.blocks.options.items() if name not in variant.blocks.sizes},
    )


def cost(capability: int, dtype: str, variant: Variant) -> Cost:
    """Compile, and read what the binary uses."""
    binary = compiled(capability, dtype, variant)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        (used,) = cubin.usage(Path(file.name))
    instructions = [i for i in ("mma.sync", "wgmma", "tcgen05.mma") if i in binary.asm["ptx"]]
    warps, shared = variant.blocks.num_warps, binary.metadata.shared
    programs = resident(capability, used.registers, shared, warps)
    return Cost(
        capability, dtype, variant.name, used.registers, used.stack, shared, programs, programs * warps,
        " ".join(instructions) or "-",
    )  # fmt: skip


def resident(capability: int, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds: 64 K registers, given out by eights a thread; 1 KB of shared memory is
    taken by the system for each program.
    """
    kilobytes, threads = CHIPS[capability]
    return min(
        65536 // (-(-registers // 8) * 8 * 32 * warps), kilobytes * 1024 // (shared + 1024), threads // (32 * warps), 32
    )


def chosen(capability: int, dtype: str, every: int = 1) -> list[Variant]:
    """All variants, or one of every so many: on each chip others."""
    return variants(capability, dtype)[list(CHIPS).index(capability) % every :: every]


def costs(capability: int, dtype: str, every: int) -> list[Cost]:
    """Of the chosen variants."""
    return [cost(capability, dtype, variant) for variant in chosen(capability, dtype, every)]


def table(every: int = 1) -> list[Cost]:
    """All rows, or one of every so many. In processes: threads that parse kernels at a time can fail in CPython 3.11
    ("AST constructor recursion depth mismatch").
    """
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(costs, *zip(*PARTS, strict=True), itertools.repeat(every)) for row in rows]


def parsed(text: str) -> list[Cost]:
    """The rows of a table as ``cubin.render`` prints it."""
    fields = (re.split(r" {2,}", line.rstrip()) for line in text.splitlines()[1:])
    return [Cost(int(chip), dtype, name, *map(int, numbers), cores) for chip, dtype, name, *numbers, cores in fields]


if __name__ == "__main__":
    print(cubin.render(table()), end="")
