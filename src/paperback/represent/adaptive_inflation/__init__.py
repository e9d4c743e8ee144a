"""Adaptive inflation: generated images in contrastive learning, in the right share and with fitting views.

Images of a generative model, learned from the same unlabelled images, are added to a contrastive learner's
training set. That can hurt. With a share beta of real images in the mixture P_t = beta P_d + (1 - beta) P_g,

    TV(P_t, P_d) = (1 - beta) TV(P_g, P_d)        (exactly; theorem 3.1),

so real images have to be repeated as generated ones are added; and as data grow, a weaker augmentation
suffices to connect images of a class, with fewer wrong labels. AdaInf does both at equal compute.

`AdaptiveInflation` is an encoder around any other; `inflate` mixes two sets by index; `augmentation_graph`
shows what an augmentation does to a set of images, `classifier_tv` how far generated images are from real
ones.

Source: Y. Wang, J. Zhang and Y. Wang, Do generated data always help contrastive learning?, ICLR 2024. The
paper's settings are fixed numbers, found by a grid over downstream accuracy; the rules that choose them from
the data are ours and say so.
"""

from paperback.represent.adaptive_inflation.gap import (
    Gap,
    classifier_tv,
    real_share,
    replication,
    total_variation,
    total_variation_mixture,
)
from paperback.represent.adaptive_inflation.generator import MixtureGenerator
from paperback.represent.adaptive_inflation.graph import (
    AugmentationGraph,
    augmentation_graph,
    disc_overlap,
    view_overlap,
)
from paperback.represent.adaptive_inflation.inflated import InflatedDataset, inflate
from paperback.represent.adaptive_inflation.method import AdaptiveInflation

__all__ = [
    "AdaptiveInflation",
    "AugmentationGraph",
    "Gap",
    "InflatedDataset",
    "MixtureGenerator",
    "augmentation_graph",
    "classifier_tv",
    "disc_overlap",
    "inflate",
    "real_share",
    "replication",
    "total_variation",
    "total_variation_mixture",
    "view_overlap",
]
