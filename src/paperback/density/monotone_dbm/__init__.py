"""Monotone deep Boltzmann machines: categorical variables, any connections, one mean-field answer.

A Boltzmann machine p(x) = exp(1/2 x'Phi x + b'x) / Z over one-hot variables, with connections of any kind
(inside a layer too), whose pairwise weights are parameterised so that mean-field inference has exactly one
solution and a provably convergent iteration finds it. One trained model answers "fill in what I did not
observe, and name the class" for every pattern of observed variables.

    Phi = blkdiag(Ahat'Ahat) - Ahat'Ahat,  lmax(Phi) <= limit;      q <- prox^alpha_f((1 - alpha) q + alpha
    (Phi q + b)).

Source: Feng, Winston and Kolter, Monotone deep Boltzmann machines (TMLR 2023, arXiv 2307.04990); authors'
    code locuslab/MonotoneDBM.

What differs from the authors' code, and why:
- They multiply only the rows of Phi by min((1 - m) / ||A_i||^2, 1), which makes it unsymmetric: no energy has
it as its couplings. Both
  sides are scaled by the square root here, as in their theorem.
- ``margin="tight"`` bounds lmax(Phi) by 2 - m instead of 1 - m. -H is 2-strongly convex along directions that
sum to zero, so the free
  energy stays strictly convex, and the solution unique, up to 2, where a two-state ferromagnet bifurcates.
  ``margin="paper"`` is theirs.
- ``center=True`` removes from A what only moves biases, which leaves more of the limit for couplings.
- The proximal operator is solved by one Newton iteration on all its unknowns instead of two nested ones.
- Peaceman-Rachford, as monotone operator networks have it, needs I - Phi monotone and diverges under the
tight limit. One unit of f's
  strong convexity is moved to the affine part, which covers both limits.
- Gradients come from preconditioned conjugate gradients on a symmetric system; the accelerated iteration of
the authors remains as
  ``backward="anderson"``.
- Likelihood bounds, Gibbs sampling, annealed importance sampling and ``objective="pcd"`` are ours.
"""

from paperback.density.monotone_dbm.hollow import ConvCoupling, DenseCoupling, MonotoneHollow
from paperback.density.monotone_dbm.mean_field import MeanField, MeanFieldProblem, NotConverged, solve
from paperback.density.monotone_dbm.model import MonotoneDBM
from paperback.density.monotone_dbm.proximal import prox_entropy
from paperback.density.monotone_dbm.structure import Rows, Structure, Tier

__all__ = [
    "ConvCoupling",
    "DenseCoupling",
    "MeanField",
    "MeanFieldProblem",
    "MonotoneDBM",
    "MonotoneHollow",
    "NotConverged",
    "Rows",
    "Structure",
    "Tier",
    "prox_entropy",
    "solve",
]
