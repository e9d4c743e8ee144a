"""Information planes that no bin width decides: adaptive estimators of I(X;T) and I(T;Y) for hidden layers.

The activations T of a layer at an epoch, over all inputs, are turned into states by bins that hold equally
many of the values the layer shows (EBAB), or blurred by noise that follows its range (aKDE); saturating and
unbounded activations can so be compared, and the course of both informations over training drawn. With
plug-in entropies over the states, each input being distinct,

    I(X;T) = H(T) - H(T|X) = H(T),    I(T;Y) = H(T) - sum_y p(y) H(T|y).

Source: Chelombiev, Houghton and O'Donnell, Adaptive Estimators Show Information Compression in Deep Neural
Networks (ICLR 2019).

Read the numbers for what they are. Estimates from N inputs saturate at log2 N, which layers wider than about
20 units reach: use "akde" there, and mind the flag "saturated". A deterministic continuous network has
infinite I(X;T): what is measured is geometric clustering at the chosen resolution.

The authors' code differs from the paper in its KDE: noise of fixed standard deviation 0.01 is drawn, 0.01 is
then used as the variance, and absolute values are taken. Here the variance is c max|T|, as the paper says,
and nothing is drawn: the mixture's bounds are those of the noisy output. The compression score
C = max_e I(X;T)(e) - I(X;T)(end) is ours; the paper shows planes.
"""

from paperback.theory.adaptive_information.layer import mutual_information
from paperback.theory.adaptive_information.plane import InformationPlane, compression_score, draw_plane
from paperback.theory.information import ebab_edges

__all__ = ["InformationPlane", "compression_score", "draw_plane", "ebab_edges", "mutual_information"]
