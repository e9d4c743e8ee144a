"""The blocks: shapes, parameters by formula, and what a dilated kernel sees."""

import pytest
import torch

from paperback.errors import DataError
from paperback.search.sharp_darts import DARTS_PRIMITIVES, PRIMITIVES, SepConv, SharpSepConv, make_operation
from paperback.study import measure

KINDS = ("sep", "flood", "choke", "dil", "dil_flood", "dil_choke")
EVERY = sorted(
    {*PRIMITIVES, *DARTS_PRIMITIVES} | {f"{kind}_conv_{k}x{k}" for kind in KINDS for k in (3, 5, 7)}
)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_shape_of_sharp_sep_conv(kernel, stride, dilation, size):
    x = torch.randn(2, 3, *size)
    expected = (2, 5, -(-size[0] // stride), -(-size[1] // stride))
    assert SharpSepConv(3, 5, kernel, stride, dilation)(x).shape == expected
    assert SepConv(3, 5, kernel, stride, dilation)(x).shape == expected


@pytest.mark.parametrize(("mid_mult", "mid"), [(1, None), (4, None), (0.5, None), (1, 11)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_parameters_of_sharp_sep_conv(kernel, mid_mult, mid):
    c_in, c_out = 6, 10
    c_mid = int(c_out * mid_mult) if mid is None else mid
    expected = c_in * kernel**2 + c_in * c_mid + c_mid * kernel**2 + c_mid * c_out
    block = SharpSepConv(c_in, c_out, kernel, mid_mult=mid_mult, mid=mid)
    assert measure.parameters(block) == expected + 2 * (c_mid + c_out)
    assert measure.parameters(
        SharpSepConv(c_in, c_out, kernel, mid_mult=mid_mult, mid=mid, affine=False)
    ) == (expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", EVERY)
def test_every_primitive_keeps_the_size_but_for_the_stride(name, stride, affine):
    for c_in, c_out in ((4, 4), (4, 6)):
        for height, width in ((8, 8), (7, 5)):
            y = make_operation(name, c_in, c_out, stride, affine=affine)(torch.randn(2, c_in, height, width))
            assert y.shape == (2, c_out, -(-height // stride), -(-width // stride))


def test_the_stride_and_the_dilation_are_of_the_first_half_only():
    """The reach of an output pixel: k + (k - 1) with dilation 1, 2 (k - 1) + 1 + (k - 1) with 2."""
    for dilation, reach in ((1, 2), (2, 3)):
        block = SharpSepConv(1, 1, 3, dilation=dilation).double().eval()
        for parameter in block.parameters():
            torch.nn.init.constant_(parameter, 1.0)
        x = torch.ones(1, 1, 15, 15, dtype=torch.float64, requires_grad=True)
        block(x)[0, 0, 7, 7].backward()
        seen = (x.grad[0, 0] != 0).nonzero()
        assert (seen.amin(0).tolist(), seen.amax(0).tolist()) == ([7 - reach] * 2, [7 + reach] * 2)


def test_separable_and_dilated_have_equal_depth_and_size():
    sizes = {
        name: measure.parameters(make_operation(name, 8, 8)) for name in ("sep_conv_3x3", "dil_conv_3x3")
    }
    assert sizes["sep_conv_3x3"] == sizes["dil_conv_3x3"]


def test_none_is_zero_and_skip_is_the_input():
    x = torch.randn(2, 4, 6, 6)
    assert not make_operation("none", 4, 4)(x).any()
    assert make_operation("skip_connect", 4, 4)(x) is x


def test_factorized_reduce_sees_all_pixels():
    x = torch.ones(1, 4, 8, 8, requires_grad=True)
    reduce = make_operation("skip_connect", 4, 4, 2).eval()
    reduce(x).pow(2).sum().backward()
    seen = (x.grad != 0).any(1)[0]
    assert seen[::2, ::2].all()
    assert seen[1::2, 1::2].all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_operation("conv_3x3", 4, 4), "no primitive 'conv_3x3'"),
        (lambda: make_operation("sep_conv_3x5", 4, 4), "no primitive"),
        (lambda: make_operation("sep_conv_3x3", 4, 4, 3), "stride is 3"),
        (lambda: make_operation("skip_connect", 4, 5, 2), "channels_out is 5"),
        (lambda: SharpSepConv(4, 4, 4), "kernel is 4"),
        (lambda: SharpSepConv(0, 4), "at least 1"),
        (lambda: SharpSepConv(4, 4, mid=0), "at least 1"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(DataError, match=words):
        make()
