"""Networks that methods act upon, and what is read out of them."""

from paperback.networks.activations import collect_activations
from paperback.networks.shipped import pretrained, pretrained_folder, pretrained_tokenizer

__all__ = ["collect_activations", "pretrained", "pretrained_folder", "pretrained_tokenizer"]
