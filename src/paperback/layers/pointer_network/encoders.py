"""How a set or a sequence of elements is read: in order by an LSTM, or as a set by a transformer."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

HEADS = 4
State = tuple[Tensor, Tensor]  # (h, c) of an LSTM, each (layers, batch, hidden)


class LSTMEncoder(nn.Module):
    """An LSTM over the elements in their order; its last state starts the decoder. The paper's encoder.

    Args:
        input_dim: features of an element.
        hidden: width of the states.
        layers: of the LSTM.
    """

    def __init__(self, input_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_dim, hidden, layers, batch_first=True)

    def forward(
        self, points: Float[Tensor, "batch n input_dim"], lengths: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch n hidden"], State]:
        """States at every element, and the state after the last real one."""
        n = points.shape[1]
        if bool((lengths == n).all()):  # a packed sequence costs half as much again
            states, last = self.lstm(points)
            return states, last
        packed = pack_padded_sequence(points, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.lstm(packed)
        return pad_packed_sequence(states, batch_first=True, total_length=n)[0], last


class SetEncoder(nn.Module):
    """A transformer without positions: permuting the elements permutes what comes out. Ours, not the paper's.

    The decoder starts from the mean over the elements.

    Args:
        input_dim: features of an element.
        hidden: width, a multiple of the 4 heads.
        layers: of the transformer, and of the decoder's LSTM.
    """

    def __init__(self, input_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.embed = nn.Linear(input_dim, hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, HEADS, 4 * hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(hidden)
        self.transformer = nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=False)
        self.start = nn.Linear(hidden, 2 * layers * hidden)

    def forward(
        self, points: Float[Tensor, "batch n input_dim"], lengths: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch n hidden"], State]:
        """Features of every element, and the decoder's first state."""
        real = torch.arange(points.shape[1], device=points.device) < lengths[:, None]
        features = self.transformer(self.embed(points), src_key_padding_mask=~real)
        mean = (features * real[..., None]).sum(1) / lengths[:, None]
        start = self.start(mean).unflatten(1, (2, self.layers, -1)).permute(1, 2, 0, 3)
        return features, (start[0].contiguous(), start[1].contiguous())


ENCODERS = {"lstm": LSTMEncoder, "transformer": SetEncoder}
