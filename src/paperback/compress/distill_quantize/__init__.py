"""Distillation and quantization: a small network of few bits a weight, taught by a large one.

`QuantizedDistillation` trains a student whose gradient is taken at its rounded weights and applied to the
full ones; `DifferentiableQuantization` keeps a trained network's weights and learns the points that they are
rounded to. In each bucket of consecutive weights v̂ = (v - min) / (max - min), and Q(v) = (max - min) p + min
for the point p nearest to v̂. Both minimise

    (1 - λ) cross-entropy + λ T² KL(softmax(z_t / T) || softmax(z_s / T)).

The released code takes the mean of the KL over classes too, which weakens the teacher by their number;
here ``reduction`` says which, and the mean over rows is the default. Weights of layers are rounded; biases
and norms stay in full precision and are counted in the bytes.

Source: Polino, Pascanu and Alistarh, ICLR 2018 (arXiv 1802.05668), sections 2 to 4.
"""

from paperback.compress.distill_quantize.differentiable import DifferentiableQuantization, deal_points
from paperback.compress.distill_quantize.distillation import QuantizedDistillation
from paperback.compress.distill_quantize.rounding import CodebookWeight, RoundedWeight

__all__ = [
    "CodebookWeight",
    "DifferentiableQuantization",
    "QuantizedDistillation",
    "RoundedWeight",
    "deal_points",
]
