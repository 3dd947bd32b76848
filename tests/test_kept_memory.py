"""Gradients and scratch lie in memory that is kept: reused when free and not before, bounded."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import holds_in_a_forked_child
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import fnac_kernels as fk
from fnac_kernels import _dispatch, _native

pytestmark = pytest.mark.skipif(_dispatch.BACKENDS["cpu"].problem is not None, reason="the cpu backend is not built")

MIB = 1 << 20
COMPILER = os.environ.get("CXX", "c++")
SHAPE = (64, 1024, 6, 6)  # 9 MiB in float32, as much as is kept


@pytest.fixture(autouse=True)
def _emptied():
    fk.empty_cache()
    yield
    fk.empty_cache()


def features(shape=SHAPE, dtype=torch.float32, layout=torch.contiguous_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    img, aud = torch.randn(*shape, generator=generator), torch.randn(shape[0], shape[1], generator=generator)
    return img.to(dtype).contiguous(memory_format=layout).requires_grad_(), aud.to(dtype)


def gradient(img: Tensor, aud: Tensor) -> Tensor:
    return torch.autograd.grad(fk.max_logits(img, aud, backend="cpu").sum(), img)[0]


def kept(size: int) -> Tensor:
    """A block of kept memory."""
    return from_dlpack(_native.module().kept(((size // 4,), (1,)), 0))


def not_sanitized() -> None:
    """AddressSanitizer's own allocator has blocks of less than 4 MiB, where it watches them."""
    if _native.module().kept_from > 64 << 10:
        pytest.skip("built with AddressSanitizer")


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300, check=False)


def megabytes(field: str) -> float:
    return int(re.search(rf"^{field}:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


def test_a_freed_gradient_leaves_its_memory_to_the_next_and_a_held_one_does_not():
    img, aud = features()
    first = gradient(img, aud)
    address, kept = first.data_ptr(), first.clone()
    second = gradient(img, aud)
    assert second.data_ptr() != address
    assert torch.equal(first, kept)
    view = first[3:]
    del first
    assert gradient(img, aud).data_ptr() != address, "a view still holds it"
    del view
    others = [gradient(img, aud) for _ in range(2)]
    assert address in [other.data_ptr() for other in others]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_of_what_the_memory_held_shows(dtype, layout):
    img, aud = features((128, 1024, 6, 6), dtype, layout)
    maps = torch.rand(128, 6, 6)
    operations = {
        "loss": lambda: fk.fnac_loss(img, aud, backend="cpu").loss,
        "max_logits": lambda: fk.max_logits(img, aud, backend="cpu").sum(),
        "paired_maps": lambda: fk.paired_maps(img, aud, backend="cpu").sum(),
        "foreground_pool": lambda: fk.foreground_pool(img, maps, backend="cpu").sum(),
    }
    for name, operation in operations.items():
        (clean,) = torch.autograd.grad(operation(), img)
        address, expected = clean.data_ptr(), clean.clone()
        clean.fill_(float("nan"))
        del clean
        (again,) = torch.autograd.grad(operation(), img)
        assert again.data_ptr() == address, name
        assert torch.equal(again, expected), name
        assert (again.dtype, again.stride()) == (img.dtype, img.stride())


def test_a_leaf_takes_the_gradient_without_copying_it_and_adds_the_next_to_it():
    img, aud = features()
    address = gradient(img, aud).data_ptr()
    loss = fk.max_logits(img, aud, backend="cpu").sum()
    loss.backward(retain_graph=True)
    assert img.grad.data_ptr() == address
    once = img.grad.clone()
    loss.backward()
    torch.testing.assert_close(img.grad, 2 * once)


@pytest.mark.parametrize(("channels", "on_a_page"), [(127, False), (128, True)])
def test_gradients_of_less_than_64_kib_are_left_to_the_c_library(channels, on_a_page):
    not_sanitized()
    img, aud = features((4, channels, 8, 4))
    several = [gradient(img, aud) for _ in range(8)]
    assert all(x.data_ptr() % 4096 == 0 for x in several) == on_a_page
    assert {x.untyped_storage().nbytes() for x in several} == {img.nbytes}


# Counts what is asked of the C library in blocks of 64 KiB and more, by whatever it is loaded before.
COUNT_LARGE_BLOCKS = """
#include <atomic>
#include <cerrno>
#include <cstddef>
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
static std::atomic<long> large{0};
static size_t counted(size_t size) {
  large += size >= 64 << 10;
  return size;
}
long large_blocks() { return large; }
void* malloc(size_t size) { return __libc_malloc(counted(size)); }
void* calloc(size_t count, size_t size) { return counted(count * size), __libc_calloc(count, size); }
void* realloc(void* block, size_t size) { return __libc_realloc(block, counted(size)); }
void* memalign(size_t alignment, size_t size) { return __libc_memalign(alignment, counted(size)); }
void* aligned_alloc(size_t alignment, size_t size) { return __libc_memalign(alignment, counted(size)); }
int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = __libc_memalign(alignment, counted(size));
  return *block ? 0 : ENOMEM;
}
}
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts the calls of glibc")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_asks_the_c_library_for_no_large_block(dtype, tmp_path):
    """Which looks at the heap's end where it frees 64 KiB or more, and gives back what others left there."""
    not_sanitized()
    counter = tmp_path / "count.so"
    build = [COMPILER, "-x", "c++", "-", "-shared", "-fPIC", "-o", str(counter)]
    subprocess.run(build, input=COUNT_LARGE_BLOCKS, text=True, check=True)
    code = f"""
import ctypes, torch, fnac_kernels as fk
large_blocks = ctypes.CDLL(None).large_blocks
def asked_for_by(function):
    before = large_blocks()
    function()
    return large_blocks() - before
assert asked_for_by(lambda: torch.empty(64 << 10, dtype=torch.uint8)) == 1, "counts nothing"
for b in (32, 128, 256):
    img, aud = torch.randn(b, 512, 7, 7).to({dtype}).requires_grad_(), torch.randn(b, 512).to({dtype}).requires_grad_()
    def step():
        torch.autograd.grad(fk.fnac_loss(img, aud, backend="cpu").loss, (img, aud))
    step()
    print(b, asked_for_by(step))
"""
    done = run(code, LD_PRELOAD=str(counter))
    assert (done.returncode, done.stdout) == (0, "32 0\n128 0\n256 0\n"), done.stderr


def test_empty_cache_gives_back_what_nobody_holds():
    img, aud = features((64, 1024, 16, 16))  # 64 MiB
    held, freed = gradient(img, aud), gradient(img, aud)
    del freed
    before = megabytes("VmRSS")
    fk.empty_cache()
    assert 60 < before - megabytes("VmRSS") < 70
    kept = held.clone()
    gradient(img, aud)
    assert torch.equal(held, kept)


def test_a_gradient_of_another_size_takes_what_is_a_little_larger_and_otherwise_frees_it_first():
    before = megabytes("VmSize")

    def grown() -> float:
        return megabytes("VmSize") - before

    block = kept(100 * MIB)
    first = block.data_ptr()
    del block
    block = kept(90 * MIB)
    assert block.data_ptr() == first
    assert block.nbytes == 90 * MIB
    del block
    block = kept(100 * MIB)
    assert block.data_ptr() == first
    del block
    for size in (60, 110):  # wastes too much; does not fit
        other = kept(size * MIB)
        assert size <= grown() < size + 4
        del other
        assert size <= grown() < size + 4
    fk.empty_cache()
    assert abs(grown()) < 4


def test_a_small_gradient_has_its_own_block_again_and_frees_no_large_one():
    large = kept(60 * MIB)
    where = {60: large.data_ptr()}
    del large
    for size in (3, 5, 3, 5, 60):  # each rounded up to whole huge pages, by more than a quarter of itself
        block = kept(size * MIB)
        assert where.setdefault(size, block.data_ptr()) == block.data_ptr()
        del block


def test_large_scratch_borrows_any_block_that_is_large_enough_and_leaves_it_as_it_was(monkeypatch):
    # Without room for them in the results:
    monkeypatch.setattr(_dispatch.BACKENDS["cpu"].load(), "row_stats_columns", lambda *_: 16)
    n = 1200  # half of three matrices of n x n in float32: 9 MB
    inputs = torch.randn(n, n), torch.randn(n, 16), torch.randn(n, 16), torch.randn(n, 16)
    fk.adjacency_contrastive(*inputs, backend="cpu")
    fk.empty_cache()
    before = megabytes("VmSize")
    fk.adjacency_contrastive(*inputs, backend="cpu")
    assert 8 < megabytes("VmSize") - before < 14, "kept for the next"
    block = kept(64 * MIB)
    address = block.data_ptr()
    assert 64 <= megabytes("VmSize") - before < 68, "a larger result frees it"
    del block
    fk.adjacency_contrastive(*inputs, backend="cpu")
    assert 64 <= megabytes("VmSize") - before < 68
    assert kept(64 * MIB).data_ptr() == address


def test_no_more_is_kept_than_512_mib_and_16_blocks():
    before = megabytes("VmSize")
    many = [kept(10 * MIB) for _ in range(20)]
    del many
    assert 160 <= megabytes("VmSize") - before < 164
    fk.empty_cache()
    large = [kept(300 * MIB) for _ in range(2)]
    del large
    assert 300 <= megabytes("VmSize") - before < 304
    fk.empty_cache()
    huge = kept(513 * MIB)
    del huge
    assert megabytes("VmSize") - before < 4


def test_where_all_places_are_taken_a_larger_block_is_kept_for_the_smallest():
    small = [kept((64 << 10) * i) for i in range(1, 17)]
    large = kept(3 * MIB)
    addresses, where = [x.data_ptr() for x in small], large.data_ptr()
    del small
    del large
    assert kept(3 * MIB).data_ptr() == where
    assert kept(64 << 10).data_ptr() == addresses[1], "the smallest made place"


def test_a_block_that_nobody_makes_a_tensor_of_is_kept_for_the_next():
    capsule = _native.module().kept(((2, 3 * MIB), (3 * MIB, 1)), 1)
    before = megabytes("VmSize")
    del capsule
    block = from_dlpack(_native.module().kept(((2, 3 * MIB), (1, 2)), 2))
    assert abs(megabytes("VmSize") - before) < 4
    assert (block.dtype, block.shape, block.stride()) == (torch.float16, (2, 3 * MIB), (1, 2))


def test_what_cannot_be_had_is_a_memory_error():
    with pytest.raises(MemoryError):
        kept(1 << 60)


def test_several_threads_share_what_is_kept():
    img, aud = features()
    expected = gradient(img, aud).clone()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: gradient(img, aud).clone(), range(16)):
            assert torch.equal(got, expected)


def test_a_forked_child_gives_its_copy_up_and_the_parent_keeps_its_own():
    img, aud = features((64, 1024, 16, 16))
    first = gradient(img, aud)
    address = first.data_ptr()
    del first
    before = megabytes("VmSize")

    def gives_up() -> bool:
        given_up = before - megabytes("VmSize")
        again = kept(64 * MIB)  # autograd itself does not survive a fork
        return given_up > 60 and again.nbytes == 64 * MIB

    assert holds_in_a_forked_child(gives_up)
    assert gradient(img, aud).data_ptr() == address


def test_a_tensor_that_outlives_the_interpreter_does_no_harm():
    code = """
import torch, fnac_kernels as fk
img, aud = torch.randn(64, 1024, 6, 6).requires_grad_(), torch.randn(64, 1024)
fk.max_logits(img, aud, backend="cpu").sum().backward()
import builtins
builtins.kept = img
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")
