"""Mamba: selective state spaces, sequence layers of linear cost (survey: arXiv:2408.01129)."""

from paperback.layers.mamba.blocks import AttentionBlock, BlockStack, MambaBlock, MLPBlock
from paperback.layers.mamba.convert import replace_attention
from paperback.layers.mamba.language_model import MambaLM
from paperback.layers.mamba.mixer import Mamba, no_decay_groups
from paperback.layers.mamba.scan_orders import ScanOrder
from paperback.layers.mamba.selective_scan import selective_scan
from paperback.layers.mamba.ssd import ssd_scan
from paperback.layers.mamba.trapezoid import trapezoid_scan
from paperback.layers.mamba.vision import VisionMamba

__all__ = [
    "AttentionBlock",
    "BlockStack",
    "MLPBlock",
    "Mamba",
    "MambaBlock",
    "MambaLM",
    "ScanOrder",
    "VisionMamba",
    "no_decay_groups",
    "replace_attention",
    "selective_scan",
    "ssd_scan",
    "trapezoid_scan",
]
