"""Classification by components as RBF networks: prototypes, presence and absence, certificates.

A component k is detected in x to a degree d_k(x) in [0, 1]; a class has, for each component, a probability
that its presence counts and a probability that its absence counts, all of them together summing to one:

    A_c(x) = sum_k r+_kc d_k(x) + r-_kc (1 - d_k(x)),     prediction = argmax_c A_c(x)

With d_k = exp(-delta(x, w_k) / sigma) and delta a metric, no input within eps*(x) of x is classified
otherwise, and eps* has a closed form that is also the loss.

Source: Saralajew, Rana, Villmann and Shaker, AAAI 2025, arXiv 2412.15499. The closed form bounds what a
component does for a class and what it does for a rival apart, and lets every detection move by the whole
radius; only their difference can change the decision, and components lie in different directions.
`certificate.tight_radii` and `relative.relative_radii` use that and hold further out. The closed form is the
loss.
"""

from paperback.explain.prototype_rbf.classifier import RBFPrototypeClassifier
from paperback.explain.prototype_rbf.deep import DeepCBC, Patch
from paperback.explain.prototype_rbf.heads import CBCHead, OriginalCBCHead, RBFHead, margin_loss
from paperback.explain.prototype_rbf.network import PrototypeNetwork

__all__ = [
    "CBCHead",
    "DeepCBC",
    "OriginalCBCHead",
    "Patch",
    "PrototypeNetwork",
    "RBFHead",
    "RBFPrototypeClassifier",
    "margin_loss",
]
