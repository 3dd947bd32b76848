"""Fused kernels for audio-visual localization losses. ``fnac_loss`` is the drop-in; ``functional`` documents all."""

from fnac_kernels._dispatch import use_backend
from fnac_kernels._info import info
from fnac_kernels._native import empty_cache
from fnac_kernels.compat import patch_fnac_avl
from fnac_kernels.functional import (
    adjacency_contrastive,
    distributed_fnac_loss,
    fnac_loss,
    foreground_pool,
    max_logits,
    paired_maps,
    similarity_maps,
)
from fnac_kernels.modules import FNACLoss
from fnac_kernels.reference import FNACOutput, Terms

__version__ = "0.1.0"

__all__ = [
    "FNACLoss",
    "FNACOutput",
    "Terms",
    "adjacency_contrastive",
    "distributed_fnac_loss",
    "empty_cache",
    "fnac_loss",
    "foreground_pool",
    "info",
    "max_logits",
    "paired_maps",
    "patch_fnac_avl",
    "similarity_maps",
    "use_backend",
]
