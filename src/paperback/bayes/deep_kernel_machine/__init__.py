"""Deep kernel machines: deep Gaussian processes in a limit in which Gram matrices are learned.

A network's layers become infinitely wide while the number of outputs grows with them. Features then are
exactly Gaussian given their Gram matrices, and the Gram matrices G_l, the only parameters, maximise

    log p(Y | K(G_L)) - sum_l nu_l KL(N(0, G_l) || N(0, K(G_{l-1}))),   G_0 = X X^T / features.

nu -> infinity is the NNGP, which learns no representation. The full machine has the Gram matrices of all
data; the sparse one has those of inducing points and is linear in the number of rows.

Two classes stand for the one of the paper's likelihoods, as scikit-learn has it: `DeepKernelMachine` predicts
numbers, `DeepKernelMachineClassifier` classes. Matern kernels are there for every layer, since a Gram matrix
gives distances; separate length scales for the features are at the input only. The quadratic expansion of the
divergence is in the eigenvalues of G^-1 K, |(W W^T)^-1 - I|^2 / 4: the Frobenius norm of K G^-1 - I itself
depends on the basis.

The logarithms of kernel parameters have a weak normal prior in training, which is no part of the reported
bound: without it a full machine at any finite nu lets its kernels amplify the jitter of its matrices until
that passes for the noise of the data, and predicts with far too little of it. At low nu the full machine
overfits all the same; its default is 10 for each row and output. That of the sparse machine is 100: in the
study 10 is better on 3,000 rows, worse on 2,000, and ruinous on 300. The learning rate of the reference,
0.01, is too small for whitened parameters; 0.1 was chosen on validation data, and a cosine takes the place of
its two drops. The convolutional version and the appendix on networks whose posteriors are not Gaussian are
not implemented.

Source: Yang, Robeyns, Milsom, Anson, Schoots, Aitchison, A theory of representation learning gives a deep
generalisation of kernel methods (ICML 2023, arXiv 2108.13097).
"""

from paperback.bayes.deep_kernel_machine.estimators import DeepKernelMachine, DeepKernelMachineClassifier
from paperback.bayes.deep_kernel_machine.exact import deep_linear_grams
from paperback.bayes.deep_kernel_machine.finite import sample_finite_grams
from paperback.bayes.deep_kernel_machine.gram import Features2Gram, GramNorm, StructGram
from paperback.bayes.deep_kernel_machine.kernels import (
    ArcCosineKernel,
    GramKernel,
    LinearKernel,
    Matern32Kernel,
    Matern52Kernel,
    MixtureKernel,
    SquaredExponentialKernel,
)
from paperback.bayes.deep_kernel_machine.layers import ExactReadout, GPReadout, GramLayer
from paperback.bayes.deep_kernel_machine.machine import FullMachine, SparseMachine

__all__ = [
    "ArcCosineKernel",
    "DeepKernelMachine",
    "DeepKernelMachineClassifier",
    "ExactReadout",
    "Features2Gram",
    "FullMachine",
    "GPReadout",
    "GramKernel",
    "GramLayer",
    "GramNorm",
    "LinearKernel",
    "Matern32Kernel",
    "Matern52Kernel",
    "MixtureKernel",
    "SparseMachine",
    "SquaredExponentialKernel",
    "StructGram",
    "deep_linear_grams",
    "sample_finite_grams",
]
