"""The study of adaptive information estimators: channels whose information is known, then information planes
of networks on the 12-bit task.
"""

from __future__ import annotations

from paperback.data.simulate.icosahedron import icosahedron_task
from paperback.study import Run
from paperback.theory.studies.adaptive_information.channels import report_channels
from paperback.theory.studies.adaptive_information.planes import (
    report_estimators,
    report_generalisation,
    report_planes,
    report_resolution,
)
from paperback.theory.studies.adaptive_information.stack import choose, train_networks

SEEDS = (0, 1, 2, 3)


def study(run: Run) -> None:
    """Do hidden layers lose information about the input while they learn, when the estimator's resolution
    follows the layer's own range, and does weight decay make them lose more?

    First the estimators are held against channels whose information is known. Then networks with five
    activations and four strengths of L2 are trained on four fifths of the 4,096 inputs of a 12-bit task, and
    the information of every layer is measured on all inputs along the way. Fixed bins are the baseline. The
    claims are false if ReLU networks do not compress, or L2 does not make them.
    """
    report_channels(run)
    task = icosahedron_task()
    task = task._replace(x=2 * task.x - 1)  # networks see each bit as -1 or 1
    networks = train_networks(run, task)
    of = choose(networks)
    report_planes(run, of, networks)
    relu = [of["relu", seed] for seed in run.seeds]
    report_resolution(run, task, relu)
    report_estimators(run, task, relu[0])
    report_generalisation(run, [network for network in networks if network.condition.name == "relu"])
    run.note(
        "The information of a deterministic continuous network is infinite. All numbers here are those of "
        "its states at the resolution of the estimator, over all 4,096 inputs; none can exceed 12 bits, and "
        "layer 1 is near that bound whatever it does."
    )
