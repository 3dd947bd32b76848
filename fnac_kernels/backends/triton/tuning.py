"""Tile sizes, in one place: a table per architecture, and how a tile is fitted to a map.

Chosen by counting flops, bytes, registers and shared memory (README.md; ``tests/data/triton_resources.txt`` keeps what
the compiler made of each line), except where a line says what was measured. ``FNAC_TRITON_SWEEP=1`` tries neighbours
(sweep.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel's tiles (its constants), its warps, its stages of loads in flight, and a bound on a thread's
    registers where the compiler takes more than it needs.
    """

    sizes: dict[str, int]
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        options = {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        """Tells two settings apart, in a dictionary."""
        return tuple(sorted(self.options.items()))

    def sized(self, **sizes: int) -> Blocks:
        return replace(self, sizes=self.sizes | sizes)

    def changed(self, **settings: int | None) -> Blocks:
        return replace(self, **settings)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """As the table spells it."""
        return f"Blocks({self.sizes}, {self.num_warps}, {self.num_stages}, {self.max_registers})"


# BLOCK_P counts all rows or columns of cells in a tile, of however many images. A bound on registers is the number of
# programs that are wanted on a multiprocessor: left to itself ptxas guesses one, and for it spills a few bytes here and
# there (8 to 16, of 72, 96 or 128 registers), on another chip and with another map each time.
_HOPPER = {
    # 85 flop for a byte from the L2 cache, which is the limit: tiles of 128 x 128, two programs a multiprocessor, hide
    # one's maxima (two fifths of the products' time) behind the other's products, but have 64. Three stages are 144 KB.
    # Measured on an H100 (4096 pairs, 512 channels, 7x7) when maxima took four times the instructions: 3.20 ms; four
    # stages 3.17; BLOCK_P 128 3.69, its 4 warps 3.05; BLOCK_P 128 and BLOCK_M 256 3.34; BLOCK_C 128 in two stages 3.67.
    "max_logits": Blocks({"BLOCK_P": 256, "BLOCK_M": 128, "BLOCK_C": 64, "GROUP": 32}, 8, 3),
    # Where the size above would leave multiprocessors idle: a quarter of it, three programs or four.
    "max_logits_small": Blocks({"BLOCK_P": 64, "BLOCK_M": 64, "BLOCK_C": 64, "GROUP": 32}, 4, 3, 168),
    # Three products for one, operands split in registers.
    "max_logits_float32": Blocks({"BLOCK_P": 64, "BLOCK_M": 64, "BLOCK_C": 32, "GROUP": 32}, 4),
    # 128 accumulators a thread, two programs. Measured on an H100 (4096 pairs, 512 channels, 7x7): 3.06 ms; BLOCK_P 64
    # 3.32, 8 warps 4.80, those with four stages 4.65, with BLOCK_C 256 3.28, with BLOCK_M 128 3.85.
    "image_gradient": Blocks({"BLOCK_P": 128, "BLOCK_M": 64, "BLOCK_C": 128}, 4, 3),
    # A quarter of it for small batches: four programs a multiprocessor.
    "image_gradient_small": Blocks({"BLOCK_P": 64, "BLOCK_M": 64, "BLOCK_C": 64}, 4, 2, 128),
    # Weights are float32: 32 pairs of them are the registers of 64 in bfloat16.
    "image_gradient_float32": Blocks({"BLOCK_P": 64, "BLOCK_M": 32, "BLOCK_C": 64}, 4),
    # 32 cells at a time: with 64 the weights take the registers of the second program. Measured on an H100 (4096 pairs,
    # 512 channels, 7x7): 3.48 ms; 64 cells 5.27, 4 warps for them 3.50, BLOCK_C 256 3.57, BLOCK_M 64 4.21 to 5.69.
    "audio_share": Blocks({"BLOCK_P": 32, "BLOCK_M": 128, "BLOCK_C": 128}, 8, 3, 128),
    # Nothing is multiplied on the tensor cores: many small programs hide the gathers' latency.
    "audio_share_gather": Blocks({"BLOCK_P": 16, "BLOCK_M": 32, "BLOCK_C": 128}, 4),
    # float32 means in three products, whatever the features are. A tile of 64 reads half as much as four of 32; of 128
    # the softmaxes alone would be 128 registers a thread.
    "adjacency": Blocks({"BLOCK": 64, "BLOCK_C": 32}, 8),
    # 36 programs at a batch of 256, where tiles of 64 would give 10. With 16 channels a step and three stages 8 KB.
    "adjacency_small": Blocks({"BLOCK": 32, "BLOCK_C": 16}, 4, 3),
    # Of 16-bit features: parts of 16 bits, whose operands come straight from shared memory. Four tiles are alive (A, L,
    # L transposed, weights): 64 registers a thread; of 128 x 64 they would be 128.
    "adjacency_weights": Blocks({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_C": 64}, 8, 3),
    # 128 programs at a batch of 256 (two sides of 64 tiles), where tiles of 64 would give 32. Three a multiprocessor;
    # the compiler takes 239 registers if N is not divisible by 16, and on some chips spills to make room for four.
    "adjacency_weights_small": Blocks({"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_C": 64}, 4, 3, 168),
    # A sixth of 4096 rows makes 132 programs.
    "adjacency_features": Blocks({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_C": 128}, 8, 3),
    # 96 programs at a batch of 256 and 512 channels, where 128 channels would give 48.
    "adjacency_features_small": Blocks({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_C": 64}, 4, 3),
    # The same four for float32, in three products: 32 channels or pairs a step, of the same bytes as 64 in 16 bits.
    "adjacency_weights_float32": Blocks({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_C": 32}, 8),
    "adjacency_weights_small_float32": Blocks({"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_C": 32}, 4),
    "adjacency_features_float32": Blocks({"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_C": 128}, 8),
    "adjacency_features_small_float32": Blocks({"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_C": 64}, 4),
}
# mma.sync keeps both operands in registers: a bound on them makes spills where two programs are wanted, and tiles of
# adjacency are the small ones.
_AMPERE = _HOPPER | {
    # 64 accumulators a thread. Half as many channels would build the weights twice as often: more ALU than products.
    "image_gradient": Blocks({"BLOCK_P": 128, "BLOCK_M": 64, "BLOCK_C": 128}, 8, 3),
    # 48 KB in three stages; one program a multiprocessor (255 registers), two would need 128.
    "max_logits": Blocks({"BLOCK_P": 128, "BLOCK_M": 128, "BLOCK_C": 32, "GROUP": 32}, 8, 3),
    # Three or four programs; of 32 channels the operands' parts take 255 registers, two programs.
    "max_logits_float32": Blocks({"BLOCK_P": 64, "BLOCK_M": 64, "BLOCK_C": 16, "GROUP": 32}, 4, 3),
    # Hopper's without its bound: 194 registers, 128 would spill.
    "audio_share": Blocks({"BLOCK_P": 32, "BLOCK_M": 128, "BLOCK_C": 128}, 8, 3),
    # Three programs; tiles of 64 spill.
    **dict.fromkeys(("adjacency", "adjacency_small"), Blocks({"BLOCK": 32, "BLOCK_C": 16}, 4, 2, 168)),
    # 252 registers; 64 x 64 spill.
    "adjacency_weights_float32": Blocks({"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_C": 32}, 8),
}
# 100 KB of shared memory a multiprocessor, of which no line takes more than half; three stages spill here.
_SMALL = _AMPERE | {
    # All registers that two programs have, which three products take anyway; one product takes 193, and without a bound
    # spills to make room for four programs.
    "adjacency_weights_small_float32": _HOPPER["adjacency_weights_small_float32"].changed(max_registers=255),
    # 16 KB a program: four fit, of 32 KB three.
    "max_logits_small": _AMPERE["max_logits_small"].changed(num_stages=2),
    # 32 KB, three programs; the large tile of a chip with 164 KB takes 96.
    "adjacency_features": _HOPPER["adjacency_features_small"].changed(num_stages=2),
    "adjacency_features_small": _HOPPER["adjacency_features_small"].changed(num_stages=2),
}
# Accumulators lie in tensor memory and pass through registers for the maximum: smaller tiles.
_BLACKWELL = _HOPPER | {
    "image_gradient": _AMPERE["image_gradient"],
    # Two programs, one of them at its products while the other is at its maxima.
    "max_logits": Blocks({"BLOCK_P": 128, "BLOCK_M": 128, "BLOCK_C": 64, "GROUP": 32}, 8, 3, 128),
    # Three or four programs, where the compiler on its own spills with one TensorFloat-32 product.
    "max_logits_float32": _HOPPER["max_logits_float32"].changed(max_registers=168),
    # Four programs: there it spills too.
    "adjacency_features_small_float32": _HOPPER["adjacency_features_small_float32"].changed(max_registers=128),
}

#: By compute capability; 86 stands for the chips with 100 KB of shared memory (8.6, 8.7, 8.9, 12.x).
TABLE: dict[int, dict[str, Blocks]] = {80: _AMPERE, 86: _SMALL, 90: _HOPPER, 100: _BLACKWELL}


@functools.cache
def architecture(device: torch.device) -> int:
    """The line of the table that serves a device; Triton's interpreter takes Hopper's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 7), (8, 9)) or major >= 12:
        return 86
    return max((known for known in TABLE if known <= 10 * major + minor), default=80)


def _line(x: Tensor, name: str) -> Blocks:
    return TABLE[architecture(x.device)][name]


@functools.cache
def _fitted(fit: Callable[[Blocks, int], Blocks], capability: int, name: str, cells: int) -> Blocks:
    """A line of the table for a map: at 256 pairs the host's time is the limit, and fitting takes 10 us of it."""
    return fit(TABLE[capability][name], cells)


def power_of_two(count: int) -> int:
    """The smallest power of two that holds ``count``."""
    return 1 << (count - 1).bit_length()


def _cells(count: int) -> int:
    """Cells in a tile; the tensor cores want 16 at least, and 64 fit the usual maps with little waste."""
    return min(max(16, power_of_two(count)), 64)


def max_logits(img: Tensor, n: int, m: int, cells: int) -> Blocks:
    capability = architecture(img.device)
    if img.dtype == torch.float32:
        return _fitted(fit_max_logits, capability, "max_logits_float32", cells)
    blocks = _fitted(fit_max_logits, capability, "max_logits", cells)
    programs = (n // blocks.sizes["IMAGES"]) * (m // blocks.sizes["BLOCK_M"])
    return blocks if programs >= 128 else _fitted(fit_max_logits, capability, "max_logits_small", cells)


def fit_max_logits(blocks: Blocks, cells: int) -> Blocks:
    """A tile for a map of up to 64 cells; of larger ones tiles of 64, and one of 16 or 32 where that holds the rest."""
    width = _cells(cells)
    full = cells > width
    tail = _cells((cells - 1) % width + 1) if full else width
    if full and tail == width:
        tail = 0
    # Two programs of 8 warps: of a single tile the compiler makes them by itself (and spills when told to), of a loop
    # of full tiles when told to, of two kinds of tiles not at all.
    bound = None if blocks.num_warps == 8 and (tail or not full) else blocks.max_registers
    fitted = blocks.sized(BLOCK_P=width, IMAGES=blocks.sizes["BLOCK_P"] // width, FULL=int(full), TAIL=tail)
    return fitted.changed(max_registers=bound)


def image_gradient(img: Tensor, n: int, cells: int) -> Blocks:
    if img.dtype == torch.bfloat16:
        name = "image_gradient" if n * cells >= 128 * 64 else "image_gradient_small"
    else:
        name = "image_gradient_float32"
    return _fitted(fit_image_gradient, architecture(img.device), name, cells)


def fit_image_gradient(blocks: Blocks, cells: int) -> Blocks:
    """One or two images a program: two where both fit. Of half a tile or less, two programs of 8 warps fit too.

    With 4 warps up to 64 cells of an image: 128 of one spill, 64 of each of two do not.
    """
    rows = blocks.sizes["BLOCK_P"]
    width = min(max(16, power_of_two(cells)), rows if blocks.num_warps == 8 else 64)
    images = 2 if 2 * width <= rows else 1
    two_programs = blocks.num_warps == 8 and 2 * images * width <= rows
    bound = 128 if two_programs else blocks.max_registers
    return blocks.sized(BLOCK_P=width, IMAGES=images).changed(max_registers=bound)


def audio_share(img: Tensor, cells: int, gather: bool) -> Blocks:
    if gather:
        return _line(img, "audio_share_gather")
    return _fitted(fit_audio_share, architecture(img.device), "audio_share", cells)


def fit_audio_share(blocks: Blocks, cells: int) -> Blocks:
    return blocks.sized(BLOCK_P=min(blocks.sizes["BLOCK_P"], _cells(cells)))


def splits(tiles: int, images: int) -> int:
    """Ranges of images, so that the sounds' gradient has some 256 programs; at least 8 images each."""
    return max(1, min(256 // tiles, images // 8))


@functools.cache
def audio_gradient() -> Blocks:
    """One sound's channels: memory traffic alone."""
    return Blocks({"BLOCK_C": 512}, num_warps=4)


def _sized(aud: Tensor, name: str) -> str:
    """For a batch of up to 512 small tiles, so that all multiprocessors have one."""
    return f"{name}_small" if len(aud) <= 512 else name


def _adjacency_line(aud: Tensor, name: str) -> Blocks:
    return _line(aud, _sized(aud, name) + ("_float32" if aud.dtype == torch.float32 else ""))


def adjacency(aud: Tensor) -> Blocks:
    return _line(aud, _sized(aud, "adjacency"))


def adjacency_weights(aud: Tensor) -> Blocks:
    return _adjacency_line(aud, "adjacency_weights")


def adjacency_features(aud: Tensor) -> Blocks:
    return _adjacency_line(aud, "adjacency_features")


@functools.cache
def adjacency_rows() -> Blocks:
    """Sums over slots: memory traffic alone."""
    return Blocks({"BLOCK": 64}, num_warps=2)


@functools.cache
def elements() -> Blocks:
    """Element by element: memory traffic alone."""
    return Blocks({"BLOCK": 1024}, num_warps=4)


@functools.cache
def rows(cells: int) -> Blocks:
    """A tile that is turned: 32 values a thread are its loads in flight."""
    return Blocks({"BLOCK_P": _cells(cells), "BLOCK_C": 64}, num_warps=4)


@functools.cache
def whole_image(cells: int) -> Blocks | None:
    """All cells of some channels, 16 values a thread. None where a map has so many that one program is too few."""
    block_p = max(16, power_of_two(cells))
    return None if cells > 256 else Blocks({"BLOCK_P": block_p, "BLOCK_C": 4096 // block_p}, num_warps=8)


@functools.cache
def part_of_image(cells: int) -> Blocks:
    """Some cells of some channels: of a map alone, or of one that has many cells."""
    return Blocks({"BLOCK_P": min(max(16, power_of_two(cells)), 32), "BLOCK_C": 64}, num_warps=4)
