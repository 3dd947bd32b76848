"""Block sizes, in one place. Chosen by counting registers and waste, none measured on a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel's tiles (``asdict`` gives its constants) and its warps and stages."""

    sizes: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


def _cells(count: int, most: int) -> int:
    """The power of two that holds a map's cells, in 16..most."""
    return min(max(16, 1 << (count - 1).bit_length()), most)


def max_logits(cells: int, wide: bool) -> Blocks:
    """Accumulators of 64 x 128 over 8 warps are 32 registers a thread; 49 cells fill 77 % of 64 rows. Float32 operands
    (``wide``) are held in registers and spill at a depth of 64.
    """
    depth = 32 if wide else 64
    return Blocks({"BLOCK_P": _cells(cells, 64), "BLOCK_M": 128, "BLOCK_C": depth}, num_warps=8, num_stages=3)


def pooling(cells: int) -> Blocks:
    """One program reads an image twice, the second time from cache."""
    return Blocks({"BLOCK_P": _cells(cells, 32), "BLOCK_C": 64}, num_warps=4, num_stages=2)


def image_gradient(cells: int) -> Blocks:
    """A tile of one image's gradient; the sounds pass by."""
    return Blocks({"BLOCK_P": _cells(cells, 64), "BLOCK_M": 64, "BLOCK_C": 64}, num_warps=4, num_stages=2)


def audio_gradient(cells: int) -> Blocks:
    """A tile of the sounds' gradient; the images pass by. With 4 warps it needs every register."""
    return Blocks({"BLOCK_P": _cells(cells, 64), "BLOCK_M": 64, "BLOCK_C": 64}, num_warps=8, num_stages=2)


def adjacency() -> Blocks:
    """Four tiles (A, F, I, L) are alive at a time: 32 x 32 over 8 warps is 4 registers a thread for each."""
    return Blocks({"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_C": 32}, num_warps=8, num_stages=2)


def adjacency_gradient() -> Blocks:
    """Transposed tiles come on top: with 32 columns the gradient of the foreground features spills."""
    return Blocks({"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_C": 32}, num_warps=8, num_stages=2)
