"""Three TensorFloat-32 products for a float32 one, as ``products.py`` adds them up: emulated, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

TAU, CHANNELS, BLOCK_C = 0.03, 512, 32


def tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, rounded to nearest."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def cut_sum(total: Tensor, more: Tensor) -> Tensor:
    """``total + more`` as the tensor cores accumulate: cut to float32, not rounded."""
    exact = total.double() + more
    rounded = exact.float()
    return torch.where(rounded.double().abs() > exact.abs(), rounded.nextafter(torch.zeros(())), rounded)


def product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b'`` in steps of eight channels, each of them exact but for the cut."""
    for k in range(0, a.shape[1], 8):
        total = cut_sum(total, a[:, k : k + 8].double() @ b[:, k : k + 8].double().T)
    return total


def three_products(a: Tensor, b: Tensor, block: int) -> Tensor:
    """The sum over blocks of channels, each made on the tensor cores, rounded to nearest outside of them."""
    total = torch.zeros(len(a), len(b))
    for k in range(0, a.shape[1], block):
        x, y = a[:, k : k + block], b[:, k : k + block]
        high_x, high_y = tf32(x), tf32(y)
        inner = product(torch.zeros_like(total), tf32(x - high_x), high_y)
        inner = product(inner, high_x, tf32(y - high_y))
        total = total + product(inner, high_x, high_y)
    return total


@pytest.mark.parametrize("alike", [False, True], ids=["random", "alike"])
def test_three_products_added_outside_are_as_good_as_float32(alike):
    a, b = torch.randn(128, CHANNELS), torch.randn(128, CHANNELS)
    if alike:  # all products positive: cutting errors add up
        centre = torch.rand(1, CHANNELS)
        a, b = centre + 0.05 * a, centre + 0.05 * b
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    exact = a.double() @ b.double().T

    def error(products: Tensor) -> float:
        return ((products - exact).abs().max() / TAU).item()

    ours = error(three_products(a, b, BLOCK_C))
    assert ours <= 1.5 * error(a @ b.T)
    assert ours <= 1.5e-5
    assert error(three_products(a, b, CHANNELS)) > 3 * ours
