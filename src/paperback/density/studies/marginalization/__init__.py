"""The study of marginalization models: an Ising lattice without data, binary digits, images of 784 pixels."""

from __future__ import annotations

from paperback.density.studies.marginalization.lattice import report_lattice, train_on_lattice
from paperback.density.studies.marginalization.rows import report_rows, train_on_rows
from paperback.density.studies.marginalization.speed import report_speed, train_on_images
from paperback.study import Run

SEEDS = (2, 3)  # 0 and 1 were seen while the study was made


def study(run: Run) -> None:
    """Marginals of any variables in one network call: are they right, and how much faster than by an
    any-order autoregressive model of the same size?

    Three experiments. On an Ising lattice small enough to be summed out, both train on the energy alone and
    everything is compared with the truth. On binary digits the marginal head is compared with the model's own
    conditionals over 20 orders, and with exact models. On images of 784 pixels both are timed at equal
    quality. The central claims are false if the marginals do not beat the product of one-variable marginals
    on random subsets, or if the speed-up is below 5.
    """
    if run.data is None:
        lattices = [train_on_lattice(run, seed) for seed in run.track(run.seeds, "lattice")]
        report_lattice(run, lattices)
    digits = [train_on_rows(run, seed) for seed in run.track(run.seeds, "rows")]
    report_rows(run, digits)
    if run.data is None:
        large = [train_on_images(run, seed) for seed in run.track(run.seeds, "images")]
        report_speed(run, large)
    run.note(
        "Six bars are not the sheet's but set here: those against the ARM, Spearman on subsets of digits, "
        "growth of the speed-up, and the quality at 784 pixels. They and the settings were frozen after runs "
        "with seeds 0 and 1; the seeds and the test images of this record are others."
    )
    run.model("model", digits[0].model)
