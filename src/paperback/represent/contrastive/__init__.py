"""Contrastive learners: an encoder that gives two random views of an image the same features.

`SimCLR` tells views of one image from views of all others in the batch, `MoCo` from a queue of earlier ones;
`BYOL` and `BarlowTwins` do without negatives. They share one loop (`ContrastiveLearner`), which can be given
a budget in steps, so that trainings on more or fewer images cost the same.
"""

from paperback.represent.contrastive.barlow_twins import BarlowTwins, barlow_twins_loss
from paperback.represent.contrastive.byol import BYOL
from paperback.represent.contrastive.learner import ContrastiveLearner, ImageSource
from paperback.represent.contrastive.moco import MoCo
from paperback.represent.contrastive.simclr import SimCLR

__all__ = [
    "BYOL",
    "BarlowTwins",
    "ContrastiveLearner",
    "ImageSource",
    "MoCo",
    "SimCLR",
    "barlow_twins_loss",
]
