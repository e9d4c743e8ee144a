"""SparK: masked-image pre-training for convolutional networks.

Patches of an image are hidden, the network encodes the rest, and a decoder predicts what is missing. Hidden
patches are treated as absent rather than as zeros: sparse convolution, y = A * conv(A * x), with batch and
layer norms over active positions only, so that masks do not blur away from layer to layer and no statistics
of masks enter. Maps of every scale, their gaps filled with learned tokens, feed a light U-shaped decoder, and
the loss is the squared error of hidden patches, each normalised by its own mean and deviation,

    loss = mean over hidden patches of |decoder(densify(S_1 .. S_k)) - (p - mean) / sqrt(var + 1e-6)|^2.

Source: Tian, Jiang, Diao, Lin, Wang and Yuan, Designing BERT for convolutional networks: sparse and
hierarchical masked modeling, ICLR 2023, arXiv 2301.03580. Three things are otherwise here: the learning rate
rises from near 0 and falls to 0 (from 0.5 % and to 0.1 % of the peak there); projections of the densified
maps are drawn as torch draws them, as in the authors' code; drop path belongs to the backbone.
"""

from paperback.represent.spark.backbone import FeatureMaps, HierarchicalBackbone
from paperback.represent.spark.context import SparseContext
from paperback.represent.spark.conversion import dense_to_sparse, sparse_to_dense, unsupported
from paperback.represent.spark.decoder import Decoder, Densify
from paperback.represent.spark.erosion import active_shares
from paperback.represent.spark.lamb import Lamb
from paperback.represent.spark.layers import (
    SparseAdaptiveAvgPool2d,
    SparseAvgPool2d,
    SparseBatchNorm2d,
    SparseConv2d,
    SparseGroupNorm,
    SparseInstanceNorm2d,
    SparseLayerNorm,
    SparseLayerNorm2d,
    SparseLinear,
    SparseMaxPool2d,
    SparseSyncBatchNorm,
)
from paperback.represent.spark.masking import masked_patch_loss, patchify, random_mask, unpatchify
from paperback.represent.spark.method import MaskedReconstruction, SparK

__all__ = [
    "Decoder",
    "Densify",
    "FeatureMaps",
    "HierarchicalBackbone",
    "Lamb",
    "MaskedReconstruction",
    "SparK",
    "SparseAdaptiveAvgPool2d",
    "SparseAvgPool2d",
    "SparseBatchNorm2d",
    "SparseContext",
    "SparseConv2d",
    "SparseGroupNorm",
    "SparseInstanceNorm2d",
    "SparseLayerNorm",
    "SparseLayerNorm2d",
    "SparseLinear",
    "SparseMaxPool2d",
    "SparseSyncBatchNorm",
    "active_shares",
    "dense_to_sparse",
    "masked_patch_loss",
    "patchify",
    "random_mask",
    "sparse_to_dense",
    "unpatchify",
    "unsupported",
]
