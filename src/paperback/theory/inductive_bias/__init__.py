"""Inductive bias in bits: how rare, among hypotheses that fit the training data, are those that generalise.

A hypothesis space H has a distribution over its hypotheses: the functions of a kernel, or networks trained
from random weights. Given that a hypothesis fits the training data, its test error L is random, and

    I(e) = -log2 P(L <= e | h fits the training set)

is the number of bits that the space still lacks to generalise to the error e. Few bits: the space itself
carries the bias that the task needs. The difference of two spaces on one task is the bias that one adds.

For a kernel the law of L is known. Given an exact fit, the values at the test points are Gaussian with mean a
and covariance S, the same for each output, so that L = sum_k w_k chi'^2 is a quadratic form, and its left
tail is computed by saddlepoint (`method="exact"`). For networks the law is fitted to the errors of trained
models (`method="ncx2"`), with a bootstrap interval over models, and how far the target lies outside what was
seen.

What differs from the authors' code, and why:

- They fit a scaled non-central chi-square to draws in the kernel space too. The target lies thousands of nats
  out in the tail, where even the best fit is too low, by up to a half; the exact law costs nothing more.
- They fit it by scipy's ``ncx2.fit``, which starts at df = nc = 1 and often stops far from the maximum of the
  likelihood, for want of a finite likelihood on its way; the bits can be too few a hundredfold. Here the
  maximum is searched from the moments of the losses. `method="paper"` is the authors' estimator as it is.
- Where ``ncx2.logcdf`` underflows they take z^2 / 2 of Sankaran's normal approximation, which stays finite as
  the error goes to 0. Here the tail of the fitted law is the saddlepoint's. `sankaran_nats` is theirs.
- They solve for the kernel's coefficients by Adam; here it is a Cholesky factor, or conjugate gradients
  from 5,000 rows on.
- Theirs is in nats, ours in bits.

Source: Boopathy, Yue, Hwang, Iyer and Fiete, Towards Exact Computation of Inductive Bias, IJCAI 2024
(arXiv:2406.15941), with the authors' code; Sankaran (1959), Biometrika 46.
"""

from paperback.theory.inductive_bias.estimator import InductiveBias, added_bias
from paperback.theory.inductive_bias.kernel_space import KernelSpace, Posterior, rbf
from paperback.theory.inductive_bias.laws import (
    EmpiricalLaw,
    LossLaw,
    PaperLaw,
    bits_from_losses,
    fit_law,
    sankaran_nats,
)
from paperback.theory.inductive_bias.network_space import Fit, NetworkSpace

__all__ = [
    "EmpiricalLaw",
    "Fit",
    "InductiveBias",
    "KernelSpace",
    "LossLaw",
    "NetworkSpace",
    "PaperLaw",
    "Posterior",
    "added_bias",
    "bits_from_losses",
    "fit_law",
    "rbf",
    "sankaran_nats",
]
