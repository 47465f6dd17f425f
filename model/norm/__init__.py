"""Batch-norm with statistics per view for both views in one batch, and over all ranks if wanted."""

from model.norm.apex_norm import ApexBatchNorm
from model.norm.layers import TwinBatchNorm, joined_views, synchronise_norms

__all__ = ["ApexBatchNorm", "TwinBatchNorm", "joined_views", "synchronise_norms"]
