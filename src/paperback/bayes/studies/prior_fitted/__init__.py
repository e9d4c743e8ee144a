"""The study of prior-fitted networks: distance to exact posteriors, MLE-II and HMC, and small tables."""

from __future__ import annotations

from paperback.bayes.studies.prior_fitted.fixed import fixed_gp, report_fixed
from paperback.bayes.studies.prior_fitted.tables import report_tables, small_tables
from paperback.bayes.studies.prior_fitted.uncertain import report_uncertain, uncertain_gp
from paperback.study import Run

SEEDS = (0, 1, 2)


def study(run: Run) -> None:
    """Does a transformer that was trained on data sets of a prior give that prior's posterior predictive, in
    one forward pass?

    Part one fits small networks to a Gaussian process with known hyper-parameters and measures the distance
    to the exact posterior. Part two gives the hyper-parameters a prior: the truth is a quadrature, the rivals
    are MLE-II and HMC, in quality and in time. Part three takes the classifier that ships to small tables.
    The claims are false if the distance does not shrink with training, if MLE-II is better on five rows, or
    if HMC takes less than 200 times as long.
    """
    fixed = [fixed_gp(run, seed) for seed in run.track(run.seeds, "known hyper-parameters")]
    report_fixed(run, fixed)
    uncertain = [uncertain_gp(run, seed) for seed in run.track(run.seeds, "hyper-priors")]
    report_uncertain(run, uncertain)
    report_tables(run, [small_tables(run, seed) for seed in run.track(run.seeds, "tables")])
    run.model("model", fixed[0].network)
