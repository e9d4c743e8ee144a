"""Building blocks to drop into a network.

A layer of this wing takes sequences ``(batch, length, dim)`` and returns sequences of the same shape, so it
goes where attention or a recurrence stood. `SequenceLayer` says what every layer does; `Conversion` is what
comes back when a converter has put layers into a user's model. A `PointerNetwork` is a whole model of sets;
its `PointerAttention` is a layer of its own.
"""

from paperback.layers.interface import Conversion, Cost, LayerChange, SequenceLayer
from paperback.layers.mamba import Mamba
from paperback.layers.pointer_network import PointerAttention, PointerNetwork

__all__ = [
    "Conversion",
    "Cost",
    "LayerChange",
    "Mamba",
    "PointerAttention",
    "PointerNetwork",
    "SequenceLayer",
]
