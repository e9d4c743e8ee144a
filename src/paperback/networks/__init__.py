"""Networks that methods act upon, and what is read out of them."""

from paperback.networks.activations import collect_activations
from paperback.networks.convnext import ConvNeXt
from paperback.networks.pyramid import FeaturePyramid, LayerNorm2d
from paperback.networks.resnet import ResNet
from paperback.networks.shipped import pretrained, pretrained_folder, pretrained_tokenizer
from paperback.networks.vit import ViT

__all__ = [
    "ConvNeXt",
    "FeaturePyramid",
    "LayerNorm2d",
    "ResNet",
    "ViT",
    "collect_activations",
    "pretrained",
    "pretrained_folder",
    "pretrained_tokenizer",
]
