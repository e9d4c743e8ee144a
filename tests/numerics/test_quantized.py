"""Quantized tensors: the grids, the rounding, the codebooks, the packing, and which files are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperback.errors import ArtefactError, DataError
from paperback.numerics.quantized import (
    Layout,
    QuantizedTensor,
    code_counts,
    entropy_bits,
    huffman_bits,
    kmeans_points,
    normal_float_points,
    pack_bits,
    packed_size,
    quantile_points,
    quantize_codebook,
    quantize_uniform,
    uniform_grid,
    uniform_points,
    unpack_bits,
)

LAYOUTS = [("tensor", None), ("channel", None), ("group", 16), ("group", 7), ("bucket", 64), ("bucket", 1000)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_is_the_identity_at_every_width_and_size_and_leaves_no_gaps(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert len(packed) == packed_size(count, bits) == math.ceil(count * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, count).long(), codes)
    # The stream, read as one large number, has code i at bit i * bits.
    number = int.from_bytes(bytes(packed.tolist()), "little")
    assert number == sum(int(code) << (i * bits) for i, code in enumerate(codes))


@pytest.mark.parametrize(("per", "size"), LAYOUTS)
def test_a_layout_gives_back_what_it_cut(per, size):
    tensor = normal(6, 5, 10)
    layout = Layout((6, 5, 10), per, size)
    groups = layout.split(tensor)
    assert groups.shape == (layout.groups, layout.width)
    assert torch.equal(layout.merge(groups), tensor)


@pytest.mark.parametrize("scheme", ["linear", "affine", "absmax"])
@pytest.mark.parametrize(("per", "size"), LAYOUTS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_rounded_value_is_within_half_a_step_and_a_group_has_no_more_values_than_codes(
    scheme, per, size, bits
):
    tensor = normal(6, 50)
    quantized = quantize_uniform(tensor, bits, per, size, scheme)
    layout = quantized.layout
    error = (layout.split(quantized.dequantize()) - layout.split(tensor)).abs()
    step = quantized.grid.scale[:, None]
    # The code of zero is rounded too, so that one end of an affine grid may lie half a step off.
    assert (error <= step * (1.001 if scheme == "affine" else 0.501)).all()
    for group in layout.split(quantized.dequantize()):
        assert len(group.unique()) <= 2**bits - (scheme == "absmax")


def test_the_linear_grid_keeps_minimum_and_maximum_and_rounding_twice_changes_nothing():
    tensor = normal(4, 64)
    quantized = quantize_uniform(tensor, 3, "channel")
    once = quantized.dequantize()
    torch.testing.assert_close(once.amin(1), tensor.amin(1))
    torch.testing.assert_close(once.amax(1), tensor.amax(1))
    assert torch.equal(quantized.grid.encode(quantized.layout.split(once)), quantized.codes)


@pytest.mark.parametrize("scheme", ["affine", "absmax"])
def test_affine_and_absmax_keep_zero(scheme):
    tensor = normal(8, 32)
    tensor[:, ::2] = 0
    quantized = quantize_uniform(tensor, 2, "channel", None, scheme)
    assert (quantized.dequantize()[:, ::2] == 0).all()


def test_round_to_nearest_is_the_formula_of_the_survey():
    tensor = normal(3, 40)
    quantized = quantize_uniform(tensor, 4, "group", 20, "affine")
    groups = tensor.reshape(6, 20)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    codes = (torch.round(groups / scale + zero)).clamp(0, 15)
    assert torch.equal(quantized.codes.reshape(6, 20).float(), codes)
    torch.testing.assert_close(quantized.dequantize(), (scale * (codes - zero)).reshape(3, 40))


@pytest.mark.parametrize("scheme", ["linear", "affine", "absmax"])
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_constant_group_is_unchanged(scheme, value):
    tensor = torch.full((2, 8), value)
    torch.testing.assert_close(quantize_uniform(tensor, 4, "channel", None, scheme).dequantize(), tensor)


def test_stochastic_rounding_is_unbiased_and_repeats_with_its_seed():
    tensor = normal(64)
    draws = 10_000
    many = tensor.repeat(draws, 1)

    def rounded(seed):
        generator = torch.Generator().manual_seed(seed)
        return quantize_uniform(many, 2, rounding="stochastic", generator=generator).dequantize()

    values = rounded(0)
    standard_error = values.std(0) / math.sqrt(draws)
    assert ((values.mean(0) - tensor).abs() <= 4.5 * standard_error + 1e-6).all()
    assert torch.equal(values, rounded(0))
    assert not torch.equal(values, rounded(1))


def test_the_best_clipping_is_never_worse_and_is_found():
    tensor = normal(16, 64)
    tensor[:, 0] = 8  # an outlier that is worth clipping at 2 bits
    plain = quantize_uniform(tensor, 2, "channel", None, "absmax").dequantize()
    clipped = quantize_uniform(tensor, 2, "channel", None, "absmax", clip="mse")
    errors = [(value - tensor).square().sum(1) for value in (plain, clipped.dequantize())]
    assert (errors[1] <= errors[0] + 1e-6).all()
    by_hand = torch.stack([
        (uniform_grid(tensor, 2, "absmax", clip=clip).round(tensor) - tensor).square().sum(1)
        for clip in torch.linspace(1, 0.3, 15).tolist()
    ])  # fmt: skip
    torch.testing.assert_close(errors[1], by_hand.amin(0))


def test_a_codebook_takes_the_nearest_point_and_the_lower_of_two():
    points = torch.tensor([0.0, 0.25, 0.5, 1.0])
    tensor = torch.tensor([0.0, 0.375, 0.376, 0.125, 0.75, 1.0])
    quantized = quantize_codebook(tensor, points, scaling="none")
    assert quantized.codes.tolist() == [0, 1, 2, 0, 2, 3]
    tensor = normal(5, 64)
    for scaling in ("linear", "absmax"):
        spread = points if scaling == "linear" else normal_float_points(4)
        quantized = quantize_codebook(tensor, spread, "group", 16, scaling)
        groups = quantized.layout.split(tensor)
        zero = 0 if quantized.grid.zero is None else quantized.grid.zero[:, None]
        values = zero + quantized.grid.scale[:, None] * spread[None]
        nearest = (groups[..., None] - values[:, None, :]).abs().amin(2)
        torch.testing.assert_close((quantized.layout.split(quantized.dequantize()) - groups).abs(), nearest)


def test_points_of_every_group_are_used_for_it():
    tensor = normal(2, 32)
    points = torch.stack([uniform_points(4), uniform_points(4) ** 2])
    both = quantize_codebook(tensor, points, "channel")
    for row in range(2):
        alone = quantize_codebook(tensor[row : row + 1], points[row], "channel")
        assert torch.equal(both.dequantize()[row], alone.dequantize()[0])


def test_uniform_points_are_the_uniform_grid():
    tensor = normal(4, 100)
    book = quantize_codebook(tensor, uniform_points(8), "channel").dequantize()
    torch.testing.assert_close(book, quantize_uniform(tensor, 3, "channel").dequantize())


def test_normal_float_points_are_those_of_nf4():
    # Table of QLoRA (arXiv 2305.14314), appendix E, to four digits.
    expected = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
                0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]  # fmt: skip
    torch.testing.assert_close(normal_float_points(4), torch.tensor(expected), atol=1e-4, rtol=0)


def test_points_of_kmeans_beat_the_others_and_are_a_fixed_point():
    tensor = normal(4000) ** 3
    points = kmeans_points(tensor, 8, rounds=300)
    error = (quantize_codebook(tensor, points, scaling="none").dequantize() - tensor).square().sum()
    quantiles = quantize_codebook(tensor, quantile_points(tensor, 8))
    assert error < 0.8 * (quantiles.dequantize() - tensor).square().sum()
    codes = quantize_codebook(tensor, points, scaling="none").codes
    means = torch.stack([tensor[codes == code].mean() for code in range(8)])
    torch.testing.assert_close(points, means, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_tensor_comes_back_in_its_own_type(dtype):
    tensor = normal(4, 32).to(dtype)
    value = quantize_uniform(tensor, 8, "channel").dequantize()
    assert value.dtype == dtype
    assert (value - tensor).abs().max() < 0.03


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["linear", "affine", "absmax"])
@pytest.mark.parametrize(("per", "size"), LAYOUTS)
def test_what_is_packed_comes_back_and_has_the_bytes_that_were_said(scheme, per, size, scale_dtype):
    quantized = quantize_uniform(normal(6, 51), 3, per, size, scheme, scale_dtype=scale_dtype)
    parts = quantized.pack()
    assert sum(part.numel() * part.element_size() for part in parts.values()) == quantized.nbytes
    empty = QuantizedTensor.empty(quantized.spec())
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {
        k: (v.shape, v.dtype) for k, v in parts.items()
    }
    back = QuantizedTensor.unpack(parts, quantized.spec())
    assert torch.equal(back.dequantize(), quantized.dequantize())


def test_the_bytes_of_four_bits_are_the_formula():
    quantized = quantize_uniform(normal(64, 256), 4, "group", 32, "affine", scale_dtype=torch.float16)
    groups = 64 * 8
    assert quantized.nbytes == 64 * 256 // 2 + groups * 2 + groups // 2


def test_huffman_lies_between_the_entropy_and_one_bit_more():
    for seed in range(5):
        counts = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(seed)) ** 2
        assert entropy_bits(counts) <= huffman_bits(counts) + 1e-9 < entropy_bits(counts) + 1
    assert huffman_bits(torch.tensor([1, 1, 2, 4])) == 1.75 == entropy_bits(torch.tensor([1, 1, 2, 4]))
    assert huffman_bits(torch.tensor([0, 7])) == 1
    quantized = quantize_uniform(normal(1000), 4)
    assert int(code_counts(quantized, quantized).sum()) == 2000


def test_rounding_to_sixteen_bits_is_for_rounding_only():
    tensor = normal(100)
    quantized = quantize_uniform(tensor, 16)
    torch.testing.assert_close(quantized.dequantize(), tensor, atol=1e-4, rtol=0)
    with pytest.raises(DataError, match="1 to 8"):
        quantized.pack()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"bits": 17}, "bits is 17"),
        ({"bits": 1, "scheme": "absmax"}, "1 only with scheme 'linear'"),
        ({"scheme": "log"}, "scheme is 'log'"),
        ({"per": "block"}, "per is 'block'"),
        ({"per": "group"}, "size is None"),
        ({"per": "bucket", "size": 0}, "size is 0"),
        ({"per": "bucket", "size": 2.5}, "size is 2.5"),
        ({"per": "channel", "size": 8}, "has none"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": "best"}, "clip is 'best'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"rounding": "stochastic"}, "needs a generator"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        quantize_uniform(normal(4, 16), **arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    tensor = normal(4, 16)
    tensor[1, 2] = bad
    with pytest.raises(DataError, match="layer 3 holds NaN or infinity"):
        quantize_uniform(tensor, name="layer 3")
    with pytest.raises(DataError, match="layer 3 holds NaN or infinity"):
        quantize_codebook(tensor, uniform_points(4), name="layer 3")


def test_other_bad_tensors_and_points_are_refused():
    with pytest.raises(DataError, match="only floating-point"):
        quantize_uniform(torch.arange(8))
    with pytest.raises(DataError, match="no entries"):
        quantize_uniform(torch.zeros(0, 4))
    with pytest.raises(DataError, match=r"too large for torch\.float16"):
        quantize_uniform(normal(8) * 1e7, scale_dtype=torch.float16)
    with pytest.raises(DataError, match="sorted"):
        quantize_codebook(normal(8), torch.tensor([1.0, 0.0]))
    with pytest.raises(DataError, match="2 to 256"):
        quantize_codebook(normal(8), torch.tensor([1.0]))
    with pytest.raises(DataError, match="codes go from 0 to 4"):
        pack_bits(torch.tensor([0, 4]), 2)
    with pytest.raises(DataError, match="3 codes of 4 bits are 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 4, 3)


def test_packed_tensors_that_do_not_fit_their_spec_are_refused():
    quantized = quantize_codebook(normal(4, 16), uniform_points(5), "channel")
    parts, spec = quantized.pack(), quantized.spec()
    with pytest.raises(ArtefactError, match="only 5 levels"):
        QuantizedTensor.unpack(parts | {"codes": torch.full_like(parts["codes"], 255)}, spec)
    with pytest.raises(ArtefactError, match="not finite"):
        QuantizedTensor.unpack(parts | {"scale": parts["scale"] * float("nan")}, spec)
    with pytest.raises(ArtefactError, match="instead of"):
        QuantizedTensor.unpack({"codes": parts["codes"]}, spec)
    # A claim of a huge tensor costs nothing: it is compared with what is there.
    with pytest.raises(ArtefactError, match="the codes of a quantized tensor"):
        QuantizedTensor.unpack(parts, spec | {"shape": [4, 10**12]})
    for wrong in (
        {"bits": 9},
        {"bits": True},
        {"shape": [-1, 4]},
        {"per": "x"},
        {"dtype": "int8"},
        {"points": [1]},
    ):
        with pytest.raises(ArtefactError, match="not the description"):
            QuantizedTensor.unpack(parts, spec | wrong)
