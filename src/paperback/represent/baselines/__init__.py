"""The honest baselines of the represent wing: what a published method has to be measured against.

`RandomFeatures` and `PCA` learn nothing or nothing deep; `DenoisingAutoencoder` and `MaskedAutoencoder`
restore images; `SimCLR` contrasts them; `Supervised` sees the labels, all of them or the few that there are.
"""

from paperback.represent.baselines.denoising import DenoisingAutoencoder
from paperback.represent.baselines.masked_autoencoder import MaskedAutoencoder
from paperback.represent.baselines.pca import PCA
from paperback.represent.baselines.random_features import RandomFeatures
from paperback.represent.baselines.supervised import Supervised
from paperback.represent.contrastive import SimCLR

__all__ = ["PCA", "DenoisingAutoencoder", "MaskedAutoencoder", "RandomFeatures", "SimCLR", "Supervised"]
