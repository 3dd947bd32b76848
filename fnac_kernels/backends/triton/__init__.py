"""The primitives as Triton kernels, one file per operation. Contracts: ``backends/README.md``."""

from fnac_kernels.backends.triton.adjacency import adjacency
from fnac_kernels.backends.triton.adjacency_backward import adjacency_backward
from fnac_kernels.backends.triton.feature_backward import feature_backward
from fnac_kernels.backends.triton.max_logits import max_logits
from fnac_kernels.backends.triton.pooling import foreground_pool, pool_pairs

__all__ = ["adjacency", "adjacency_backward", "feature_backward", "foreground_pool", "max_logits", "pool_pairs"]
