"""Pointer networks: select, order or group the elements of an input of any size by pointing back at them.

An LSTM reads the elements, another emits positions of them, one after the other. The attention of a step is
itself the output distribution,

    p(C_i = j | C_<i, P) = softmax_j(v . tanh(W1 e_j + W2 d_i)),   j = 0 .. n,  0 is "stop"

so that the dictionary of outputs is as long as the input, and one set of weights serves every length.

Source: Vinyals, Fortunato and Jaitly, Pointer networks (NeurIPS 2015, arXiv 1506.03134), section 2.3, eq. 3.
What differs, and why:
- The default optimizer is Adam with a warm-up and a cosine, which gets through the plateau of the loss far
  sooner than the paper's SGD (``fit(..., optimizer="sgd", lr=1.0, schedule="constant")``).
- A wider beam can end with a less probable output than a narrower one; it is only never worse than greedy
  search, which is done beside it.
- The baselines of fixed dictionary never name an index beyond the input: such entries are masked.
- ``encoder="transformer"`` and `PointerNetwork.reinforce` are not in the paper.
"""

from paperback.layers.pointer_network.attention import PointerAttention
from paperback.layers.pointer_network.decoding import Constraint, Decoded, permutation, triangles
from paperback.layers.pointer_network.model import PointerNetwork

__all__ = ["Constraint", "Decoded", "PointerAttention", "PointerNetwork", "permutation", "triangles"]
