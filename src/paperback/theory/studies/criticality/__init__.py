"""The study of criticality: predictions against ensembles of networks, and deep networks that train."""

from paperback.study import Run
from paperback.theory.studies.criticality.flow import flow_of_signals
from paperback.theory.studies.criticality.panels import draw_panels
from paperback.theory.studies.criticality.training import training_of_deep_networks
from paperback.theory.studies.criticality.width import spread_at_finite_width

SEEDS = (0, 1, 2)


def study(run: Run) -> None:
    """Does the theory of wide networks say how real ones behave, and do deep networks of any activation train
    when they are initialised as it says?

    Thousands of random networks are compared with the predicted size of the signal and of its fluctuations,
    layer by layer. Then networks of depth 10 and 40 are trained from PyTorch's default, Xavier, He, a
    data-driven (LSUV-like) and the critical initialisation. The claims are false if the flow departs from the
    prediction by more than its error, if the next order does not improve on the leading one, or if He keeps
    up at depth 40 where it is not critical.
    """
    flows = flow_of_signals(run)
    accuracies = training_of_deep_networks(run)
    spreads = spread_at_finite_width(run)
    draw_panels(run, flows, accuracies, spreads)
