"""sharpDARTS: architectures found by gradient, on a cell or on a grid of widths and operations.

A supernet computes a weighted mixture of all options, and the weights are learned with the network; the
strongest options are then built and trained from scratch. The paper's repairs of DARTS each stand alone: the
balanced block `SharpSepConv`, the schedule `CosinePowerAnnealing`, the grid `HyperCuboid`, and Max-W,
``o(x) = sum_o (1 - max(w) + w_o) o(x)`` with ``w = softmax(alpha)``. In the study here what is found is at
best somewhat better than a random architecture of the space, and worse than the widest one.

    space = HyperCuboid((4, 8, 16, 32), 3, ("relu", "tanh", "linear"), DenseKit(64), strides=(1,))
    found = DifferentiableSearch(space, steps=200, arch_lr=3e-3).run((x, y), (x_val, y_val))
    retrain(model := space.build(found.architecture), x, y, epochs=30)

Source: A. Hundt, V. Jain and G. D. Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture
Search", arXiv 1903.09900 (2019), and the authors' code. The rooms: `operations` the blocks, `annealing` the
schedule, `mixing` the weights, `cells` and `cuboid` (with its `kits` and `steps`) the two spaces, `search`
the search with `unrolled`, its second order, `repeats` several searches, `retraining` what comes after.
"""

from paperback.search.sharp_darts.annealing import CosinePowerAnnealing, cosine_power
from paperback.search.sharp_darts.cells import (
    SHARPSEPCONV_DARTS_MAX_W,
    CellNetwork,
    CellSpace,
    Genotype,
    parse_cell,
)
from paperback.search.sharp_darts.cuboid import Chain, HyperCuboid, read_chain
from paperback.search.sharp_darts.kits import ConvolutionKit, DenseKit, Kit
from paperback.search.sharp_darts.mixing import Mixing
from paperback.search.sharp_darts.operations import (
    DARTS_PRIMITIVES,
    PRIMITIVES,
    SepConv,
    SharpSepConv,
    make_operation,
)
from paperback.search.sharp_darts.repeats import architecture_from, search_seeds
from paperback.search.sharp_darts.retraining import PAPER_NETWORK, PAPER_TRAINING, accuracy, retrain
from paperback.search.sharp_darts.search import (
    DifferentiableResult,
    DifferentiableSearch,
    RunningSearch,
)
from paperback.search.sharp_darts.unrolled import unrolled_gradient

__all__ = [
    "DARTS_PRIMITIVES",
    "PAPER_NETWORK",
    "PAPER_TRAINING",
    "PRIMITIVES",
    "SHARPSEPCONV_DARTS_MAX_W",
    "CellNetwork",
    "CellSpace",
    "Chain",
    "ConvolutionKit",
    "CosinePowerAnnealing",
    "DenseKit",
    "DifferentiableResult",
    "DifferentiableSearch",
    "Genotype",
    "HyperCuboid",
    "Kit",
    "Mixing",
    "RunningSearch",
    "SepConv",
    "SharpSepConv",
    "accuracy",
    "architecture_from",
    "cosine_power",
    "make_operation",
    "parse_cell",
    "read_chain",
    "retrain",
    "search_seeds",
    "unrolled_gradient",
]
