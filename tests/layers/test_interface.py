"""The contract of layers, its checks, and what converters return."""

import pytest
import torch
from torch import nn

from paperback.errors import DataError, NotSupportedError
from paperback.layers.interface import (
    Conversion,
    Cost,
    LayerChange,
    SequenceLayer,
    check_mask,
    check_sequence,
)
from paperback.testing.layers import check_layer


class Pointwise(SequenceLayer):
    """A layer that looks at one position only."""

    causal = True

    def __init__(self, d_model, leak=False):
        super().__init__(d_model)
        self.linear = nn.Linear(d_model, d_model)
        self.leak = leak

    def forward(self, u, mask=None, *, state=None, return_state=False):
        check_sequence(u, self.d_model, mask)
        if state is not None or return_state:
            raise self._stateless("state")
        y = self.linear(u)
        return y + y.flip(1) if self.leak else y

    def cost(self, length):
        return Cost(2 * length * self.d_model**2, 4 * length * self.d_model)


def test_a_layer_that_keeps_the_contract_passes():
    check_layer(lambda: Pointwise(6))


def test_the_checks_find_a_layer_that_looks_ahead():
    with pytest.raises(AssertionError, match="causality_is_as_said"):
        check_layer(lambda: Pointwise(6, leak=True))


def test_a_layer_without_state_says_so():
    layer = Pointwise(4)
    with pytest.raises(NotSupportedError, match="init_state"):
        layer.init_state(2)
    with pytest.raises(NotSupportedError, match="step"):
        layer.step(torch.randn(2, 4), None)


def test_costs_add_up():
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)


@pytest.mark.parametrize(
    ("u", "mask", "message"),
    [
        (torch.zeros(2, 3), None, "three axes"),
        (torch.zeros(2, 3, 4, dtype=torch.long), None, "floating point"),
        (torch.zeros(2, 3, 5), None, "made for 4"),
        (torch.zeros(2, 0, 4), None, "length 0"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), "boolean"),
        (torch.zeros(2, 3, 4), torch.ones(3, 2, dtype=torch.bool), "must be equal"),
    ],
)
def test_bad_input_is_named(u, mask, message):
    with pytest.raises(DataError, match=message):
        check_sequence(u, 4, mask)


def test_the_message_names_the_mask():
    with pytest.raises(DataError, match="reset has dtype"):
        check_mask(torch.zeros(2, 3), torch.zeros(2, 3, 4), "reset")


def test_a_layer_needs_a_width():
    with pytest.raises(DataError, match="d_model is 0"):
        Pointwise(0)


def test_a_conversion_reports_what_was_done():
    changes = [
        LayerChange("a", "Attention", "Mamba", "changed", "fresh weights", 10, 20),
        LayerChange("b", "Attention", "Attention", "left", "cross attention", 5, 5),
    ]
    conversion = Conversion(nn.Identity(), changes)
    assert conversion.changed == changes[:1]
    assert conversion.left == changes[1:]
    assert conversion.rows()[0]["why"] == "fresh weights"
    text = str(conversion)
    assert "1 layers changed, 1 left" in text
    assert "Attention -> Mamba" in text
    assert "15 before, 25 after" in text
