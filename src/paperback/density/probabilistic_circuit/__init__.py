"""Probabilistic circuits: exact likelihood, marginals and conditionals, and a lossless coder made of them.

A circuit of sums and products over a tree of latent variables, learned by EM. Any marginal is one bottom-up
pass with the unobserved inputs set to 1, so each variable can be coded with its exact conditional given the
ones before, at the likelihood's own cost.

Source: Liu, Mandt and Van den Broeck, Lossless compression with probabilistic circuits (ICLR 2022, arXiv
    2111.11632). What differs, and why:
- ``schedule="dfs"`` keeps two messages per edge and codes all variables at the cost of two passes.
- The paper's schedule, "small_to_large", costs O(log D) passes for a tree of any depth here; deep trees need
  no rebalancing for it (see `schedules`).
- The tree schedules visit the whole subtree below a variable before the variable, its largest part first.
- Circuits made of nodes are coded too, by derivatives of the root (see `node_schedules`).
- Entropy coding is `constriction`'s: 24-bit probabilities, one stream for each block of rows.
- The hook for a flow takes any bijection of integers; the one that ships is a predictor (see `transforms`).
"""

from paperback.density.probabilistic_circuit.codec import PCCompressor
from paperback.density.probabilistic_circuit.model import ProbabilisticCircuit
from paperback.density.probabilistic_circuit.nodes import Input, NodeCircuit, Product, Sum, rat
from paperback.density.probabilistic_circuit.structure import RootedTree
from paperback.density.probabilistic_circuit.transforms import Transform, median_edge

__all__ = [
    "Input",
    "NodeCircuit",
    "PCCompressor",
    "ProbabilisticCircuit",
    "Product",
    "RootedTree",
    "Sum",
    "Transform",
    "median_edge",
    "rat",
]
