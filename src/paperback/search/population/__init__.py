"""Population based training: many models train at once, and the worse take over weights and settings of the
better.

Every member alternates between training with its own hyper-parameters and a look at the others. If it does
badly it *exploits*: it copies the weights, optimizer included, and the settings of one that does well; then
it *explores*: it changes the settings a little, and goes on. One training's wall time so gives a good model
and a schedule of settings, which no constant setting can give:

    theta <- step(theta | h);  p <- eval(theta)
    (h', theta') <- exploit(h, theta, p, P);  if theta' != theta: h <- explore(h', theta', P), theta <- theta'
    P <- P with (theta, h, p, t + 1)

Source: M. Jaderberg et al., "Population Based Training of Neural Networks", arXiv 1711.09846 (2017),
algorithm 1, section 3 and appendix A.1. Beyond it: settings never leave their ranges, and a member whose
training fails (not a number, an exception, a lost worker) ranks below everybody, so that it is replaced.

One departure: algorithm 1 evaluates a copy at once and shows its score, which is the parent's, to the others.
Here the others do not see a copy before it has been trained and evaluated. It makes no difference in a
synchronous population. In an asynchronous one whose members take turns on few workers, a lucky evaluation is
otherwise copied on and on without being trained: on the noisy quadratic model of the study, with 20 members
on one worker and turns of 50 steps, over half of all turns ended in a copy, and the loss was 0.07 to 0.15
instead of 0.04 to 0.07. With turns of 100 steps, where luck matters more than training, it was 0.05 to 0.08
instead of 0.08 to 0.10.

    make = functools.partial(TorchTrainable, make_model, make_optimizer, loss, train, validation)
    searcher = PopulationTraining({"lr": Float(1e-4, 1.0, log=True)}, size=10, synchronous=True)
    result = searcher.run(make, budget=100, engine="process", store="run")
    result.best_state, result.schedule(), result.lineage, result.plot()

`exploit` and `explore` are the strategies, `board` the population and its decisions, `turn` what a worker
does, `training` the loop, `lineage` and `result` what came of it.
"""

from paperback.search.population.exploit import Standing
from paperback.search.population.lineage import Event, Replay, Schedule, replay, schedule
from paperback.search.population.result import PopulationResult
from paperback.search.population.training import PopulationTraining

__all__ = [
    "Event",
    "PopulationResult",
    "PopulationTraining",
    "Replay",
    "Schedule",
    "Standing",
    "replay",
    "schedule",
]
