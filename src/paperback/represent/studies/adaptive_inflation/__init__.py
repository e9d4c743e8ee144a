"""The study of adaptive inflation: two exact experiments on augmentation graphs, then images."""

from __future__ import annotations

from paperback.represent.studies.adaptive_inflation.gaussians import gaussians, mixture_identity
from paperback.represent.studies.adaptive_inflation.moons import moons
from paperback.represent.studies.adaptive_inflation.pictures import pictures
from paperback.study import Run

SEEDS = (0, 1, 2, 3, 4, 5)


def study(run: Run) -> None:
    """Do generated data help contrastive learning, do poor ones hurt, and is it repaired by counting the real
    data more?

    The first two parts are exact: augmentation is uniform noise in a disc, so that the augmentation graph and
    the features of the spectral contrastive loss are known. Two Gaussians show what more data do to the
    graph; two moons, with a good and a poor generator, what generated data do to accuracy. The third part
    trains SimCLR, MoCo, BYOL and Barlow Twins on images with and without generated ones, at equal steps; it
    is reported without a bar. The claim is false if poor generated data do not hurt, or if counting the real
    data more does not help.
    """
    gaussians(run)
    mixture_identity(run)
    moons(run)
    pictures(run)
