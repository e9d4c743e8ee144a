"""MaskLLM: learn which N of every M consecutive weights stay, with the weights themselves frozen.

Each group of M inputs of an output owns a categorical law over all C(M, N) patterns. In training a mask is a
Gumbel-softmax sample of these laws, so that the loss of the network reaches their logits pi,

    p = softmax((kappa pi + g) / tau),    y = (W ⊙ (p S)) x,

with S the 0/1 matrix of the patterns; at the end each group keeps its most likely pattern. One set of weights
can so serve several domains, each with a mask of its own of 0.75 bit a weight (2:4).

In the study here 200 steps on a small language model end well below Wanda on both texts, and below SparseGPT
on one of them only; training the weights behind Wanda's mask for as long, which the method forbids itself,
does better. A mask must be learned at length: 40 further steps from a learned one, which begin with the noise
of a hot start, made it worse, on one domain as on both.

Source: Fang et al., MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, NeurIPS 2024
(arXiv 2409.17481), sections 3.2 and 3.3.
"""

from paperback.compress.masked import remove_masks
from paperback.compress.maskllm.distribution import MaskDistribution
from paperback.compress.maskllm.masks import MaskNM, apply_masks, load_masks, save_masks
from paperback.compress.maskllm.method import MaskLLM

__all__ = [
    "MaskDistribution",
    "MaskLLM",
    "MaskNM",
    "apply_masks",
    "load_masks",
    "remove_masks",
    "save_masks",
]
