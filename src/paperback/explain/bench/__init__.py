"""How classifiers that give their reasons are compared: accuracy, robustness, and what the reasons are worth.

By default on the handwritten digits of scikit-learn; else on the user's table with a target of classes, or
images. Every contender is fitted on the training rows with a few settings, the best of them on the validation
rows is measured on the test rows:

- accuracy; the share that is certified and the share that withstands attacks, within one L2 radius that is a
  quarter of the usual distance between a row and the nearest of another class. Attacks are many steps along
  the gradient, where there is one, and lines to the decision boundary; a certified row that falls to them
  counts as broken. What withstands these attacks may fall to better ones.
- explanation size: how many parts make up 90 % of what speaks for and against the predicted class beside the
  runner-up.
- faithfulness: columns are taken away (deletion) or brought back (insertion) in the order of the explanation,
  the training mean standing for nothing, and the share of predictions that stay the same is averaged. Where
  the parts of an explanation are not columns but prototypes or codes, the order comes from integrated
  gradients of the scores.

Pixels lie in 0..1. Columns of numbers are brought to mean 0 and spread 1, others become a column of 0 and 1
for each value, so that a radius across them has no unit.
"""

from paperback.compare.bench import Bench
from paperback.explain.bench.contenders import CONTENDERS
from paperback.explain.bench.data import ExplainData, load
from paperback.explain.bench.measure import METRICS, evaluate, explanation_size, faithfulness

__all__ = ["BENCH", "ExplainData", "evaluate", "explanation_size", "faithfulness", "load"]

BENCH = Bench(
    task="explain",
    metrics=METRICS,
    contenders=CONTENDERS,
    load=load,
    evaluate=evaluate,
    seconds={"smoke": 3, "quick": 8, "standard": 60, "full": 600},
)
