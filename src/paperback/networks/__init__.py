"""Networks that methods act upon, and what is read out of them."""

from paperback.networks.activations import collect_activations

__all__ = ["collect_activations"]
