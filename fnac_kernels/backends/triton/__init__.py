"""The primitives as Triton kernels, one file per operation. Contracts: ``backends/README.md``."""

import triton

from fnac_kernels.backends.triton.adjacency import adjacency
from fnac_kernels.backends.triton.adjacency_backward import adjacency_backward
from fnac_kernels.backends.triton.feature_backward import feature_backward
from fnac_kernels.backends.triton.max_logits import max_logits
from fnac_kernels.backends.triton.pooling import foreground_pool, pool_pairs
from fnac_kernels.backends.triton.products import INTERPRETED

__all__ = ["adjacency", "adjacency_backward", "feature_backward", "foreground_pool", "max_logits", "pool_pairs"]

# The compiler of 3.2 ends the process at the gradient of float32 images.
if not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    raise ImportError(f"triton {triton.__version__} cannot compile the kernels; 3.3 can, which comes with torch 2.7")
