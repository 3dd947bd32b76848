"""The max-pooled logits are float32-exact: attacks on the bound under which the screening kernels leave cells out.

The yardstick is regret: how far the chosen cell's float64 similarity is below the best one's, relative to the norms.
A float32 dot product of C terms may err by about C * 2**-24 of them; bfloat16 products err by up to 2**-8, those of
16-bit integers by up to sqrt(C) * 2**-15.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fnac_kernels as fk

CHANNELS_LAST = torch.channels_last
LAYOUTS = [torch.contiguous_format, CHANNELS_LAST]


def similarities(img: Tensor, aud: Tensor) -> Tensor:
    return torch.einsum("nchw,mc->nmhw", img.double(), aud.double()).flatten(2)


def judge(img: Tensor, aud: Tensor) -> tuple[float, float]:
    """Largest regret and largest error of a logit, both relative to the product of the norms."""
    logits, chosen = torch.ops.fnac_kernels.max_logits(img, aud, 1.0, "cpu")
    exact = similarities(img, aud)
    best = exact.max(-1).values
    norms = img.double().norm(dim=1).flatten(1).amax(1)[:, None] * aud.double().norm(dim=1)
    norms = norms.clamp(min=1e-200)  # zero vectors: similarity 0 everywhere
    regret = (best - exact.gather(-1, chosen.long()[..., None])[..., 0]) / norms
    return float(regret.max()), float(((logits.double() - best).abs() / norms).max())


def tolerance(channels: int) -> float:
    return (channels + 16) * 2.0**-24


def assert_exact(img: Tensor, aud: Tensor) -> None:
    for layout in LAYOUTS:
        regret, error = judge(img.contiguous(memory_format=layout), aud)
        assert regret <= tolerance(aud.shape[1]), layout
        assert error <= tolerance(aud.shape[1]), layout


def near_ties(spread: float, n: int = 6, m: int = 40, c: int = 200, cells: int = 49) -> tuple[Tensor, Tensor]:
    """Cells that differ only along the sounds' common direction, by up to ``spread``."""
    direction = F.normalize(torch.randn(c, dtype=torch.float64), dim=0)
    base = F.normalize(torch.randn(n, c, 1, dtype=torch.float64), dim=1)
    img = base + spread * torch.rand(n, 1, cells, dtype=torch.float64) * direction[:, None]
    aud = F.normalize(direction + 0.05 * torch.randn(m, c, dtype=torch.float64), dim=1)
    return img.float()[..., None], aud.float()


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_near_ties(spread):
    img, aud = near_ties(spread)
    assert_exact(img, aud)


def test_near_ties_are_an_attack():
    """Bfloat16 products alone do not pass: what follows the screening is needed."""
    img, aud = near_ties(1e-3)
    rounded = similarities(img.bfloat16(), aud.bfloat16()).argmax(-1)
    exact = similarities(img, aud)
    regret = exact.max(-1).values - exact.gather(-1, rounded[..., None])[..., 0]
    assert float(regret.max()) > 5 * tolerance(aud.shape[1])


@pytest.mark.parametrize("c", [16, 33, 512])
def test_values_at_the_rounding_boundary(c):
    """Every value halfway between two bfloat16 numbers, so each residual is as large as it can be."""
    halfway = 1 + 2.0**-8 * (2 * torch.randint(0, 64, (5, c, 7, 7)) + 1)
    aud = 1 + 2.0**-8 * (2 * torch.randint(0, 64, (37, c)) + 1)
    img = halfway * torch.where(torch.rand(5, c, 1, 1) < 0.5, -1.0, 1.0)
    assert_exact(img, aud * torch.where(torch.rand(37, c) < 0.5, -1.0, 1.0))


@pytest.mark.parametrize("c", [16, 33, 512])
def test_values_halfway_between_integers(c):
    """Vectors of norm 32000, so that 16-bit integers count in units of 1, all but one of whose values lie halfway."""

    def halfway(*shape: int) -> Tensor:
        values = torch.randint(-1000, 1000, shape, dtype=torch.float64) + 0.5
        values[:, 0] = 0
        values[:, 0] = (32000.0**2 - values.square().sum(1)).sqrt()
        return values.float()

    assert_exact(halfway(5, c, 7, 7), halfway(37, c))


@pytest.mark.parametrize("c", [2, 48, 5000])
@pytest.mark.parametrize("kind", ["spike", "constant", "alternating"])
def test_sums_as_large_as_the_norms_allow(c, kind):
    """Cells that are a sound, or its opposite: no partial sum of products may overflow."""
    sound = torch.zeros(1, c) if kind == "spike" else torch.ones(1, c)
    if kind == "alternating":
        sound[:, ::2] = -1
    sound[0, 0] += 1
    cells = sound[:, :, None, None] * torch.tensor([-1.0, 1.0, 0.5, -1.0]).view(1, 1, 2, 2)
    assert_exact(cells, torch.cat([sound, -sound, 3e4 * sound]))


@pytest.mark.parametrize("power", [-30, -20, -12, 0, 12, 17])
def test_norms_of_any_size(power):
    img, aud = near_ties(1e-3)
    assert_exact(img * 10.0**power, aud)
    assert_exact(img, aud * 10.0**power)


def test_norms_of_all_sizes_at_once():
    img, aud = near_ties(1e-3, n=12, m=50)
    img = img * 10.0 ** torch.linspace(-12, 12, 12)[:, None, None, None]
    aud = aud * 10.0 ** torch.linspace(-12, 12, 50)[:, None]
    img[3] = 0
    aud[7] = 0
    assert_exact(img, aud)
    cells = torch.randn(4, 64, 7, 7) * 10.0 ** torch.linspace(-4, 4, 49).view(7, 7)
    assert_exact(cells, torch.randn(9, 64))


@pytest.mark.parametrize(
    ("low", "high", "norm"), [(128, 256, None), (-1100, 1100, 32000.0)], ids=["bfloat16", "integers"]
)
def test_a_large_map_whose_pieces_have_norms_of_their_own(low, high, norm):
    """Narrowing turns a cell of similarity 0 in a piece of large norms into more than the best one, in a piece of small
    norms. In the first piece every value is a number that narrowing keeps - 0.49 in the sound's direction."""
    c, cells = 513, 28 * 28
    signs = torch.where(torch.rand(c, dtype=torch.float64) < 0.5, -1.0, 1.0)
    signs[0] = 0
    values = torch.randint(low, high - 1, (c // 2,), dtype=torch.float64)
    values = torch.stack([values + (torch.arange(c // 2) < 0.49 * (c - 1)), -values], 1)  # pairs whose sum is 1, or 0
    deceiver = signs * torch.cat([torch.zeros(1), values.flatten() - 0.49])
    if norm is not None:
        deceiver[0] = (norm**2 - deceiver.square().sum()).sqrt()  # so that integers count in units of 1
    sound, size = signs / c**0.5, deceiver.norm()
    away = -sound + 0.3 * torch.randn(cells, c, dtype=torch.float64) / c**0.5
    img = away * size * torch.where(torch.arange(cells) < cells // 2, 0.3, 1e-3)[:, None]
    img[0] = deceiver
    img[600] = 0.2 * c**0.5 * sound
    img = img.t().reshape(1, c, 28, 28)
    assert similarities(img, sound[None]).argmax() == 600
    assert_exact(img.float().repeat(3, 1, 1, 1), sound.float() * torch.tensor([1.0, 0.7, 1e4])[:, None])


@pytest.mark.parametrize(
    ("n", "m", "c", "h", "w"),
    [
        (1, 1, 1, 1, 1),
        (1, 2200, 24, 3, 3),
        (70, 1, 48, 7, 7),
        (2, 33, 31, 61, 60),
        (3, 5, 600, 29, 31),
        (130, 31, 17, 1, 2),
    ],
)
def test_sizes(n, m, c, h, w):
    img, aud = F.normalize(torch.randn(n, c, h, w), dim=1), F.normalize(torch.randn(m, c), dim=1)
    assert_exact(img, aud)


@pytest.mark.parametrize("cells", [(7, 7), (40, 41)])
def test_constant_maps_and_a_few_others(cells):
    """Every cell of a constant map is a candidate; the first of equal ones wins."""
    img = F.normalize(torch.randn(9, 40, 1, 1), dim=1).expand(9, 40, *cells).clone()
    img[4] = F.normalize(torch.randn(40, *cells), dim=0)
    aud = F.normalize(torch.randn(35, 40), dim=1)
    _, chosen = torch.ops.fnac_kernels.max_logits(img, aud, 1.0, "cpu")
    constant = [n for n in range(9) if n != 4]
    assert not chosen.long()[constant].any()
    assert_exact(img, aud)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["img", "aud"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(value, where, dtype):
    img, aud = torch.randn(6, 24, 5, 5).to(dtype), torch.randn(40, 24).to(dtype)
    if where == "img":
        img[2, 5, 1, 1] = value
    else:
        aud[11, 5] = value
    got = fk.max_logits(img, aud, backend="cpu")
    torch.testing.assert_close(got, fk.max_logits(img, aud, backend="reference"), equal_nan=True)


@pytest.mark.parametrize("cells", [1, 49])
def test_of_images_left_to_the_float32_kernel_the_others_are_not_touched(cells):
    img, aud = torch.randn(40, 32, 1, cells), torch.randn(70, 32)
    img[::3] = float("nan")
    wanted = fk.max_logits(img, aud, backend="reference")
    for dtype in (torch.float32, torch.bfloat16):
        got = fk.max_logits(img.to(dtype), aud.to(dtype), backend="cpu")
        torch.testing.assert_close(
            got.float(), wanted, equal_nan=True, rtol=0.02, atol=0.02 * float(wanted.nan_to_num().abs().max())
        )


@pytest.fixture
def _medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_medium")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_medium_precision_allows_bfloat16_products_and_no_less(layout):
    img, aud = F.normalize(torch.randn(9, 64, 13, 70), dim=1), F.normalize(torch.randn(70, 64), dim=1)
    regret, error = judge(img.contiguous(memory_format=layout), aud)
    assert max(regret, error) < 2.0**-7


@pytest.mark.usefixtures("_medium")
def test_medium_precision_is_of_float32_products_alone():
    img, aud = near_ties(1e-3)
    assert_exact(img.half(), aud.half())


def test_the_callers_floating_point_mode_is_left_alone():
    tiny = torch.tensor([1e-40])
    fk.max_logits(torch.randn(3, 32, 4, 4), torch.randn(3, 32), backend="cpu")
    assert float(tiny * 0.5) > 0
