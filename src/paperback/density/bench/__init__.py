"""How density models are compared: on completing rows of which 40 % are observed, and on what else they do.

Every contender sees the same rows, the same split and the same masks. Completion is primary, because every
density model does it; it is judged by the marginals of the hidden variables, so that a mean field competes on
equal terms with exact inference. Likelihood is reported in the form in which a model has it: exact, as an
estimate, or as two bounds, each in a column of its own, since the middle of two bounds is the likelihood of
nothing.

Images become 4 grey levels and are brought to at most 28 pixels a side (14 on a quick budget), colour to
grey; table columns become at most 8 bins. A target with classes is the class variable; a numeric target is
one more column.

On tables everybody who can draw is also judged by whole rows with mixed columns in their original units: how
well a classifier tells them from test rows, how useful they are for training a predictor of the target, how
far their correlations are off, and how many of them break the rules that stand beside the table in
``NAME.rules``. A density model draws states, and for each a training cell of that state. Rows and images are
told from real ones in states, too, which forgives what bins cannot know. Generators of tables that are no
density models have no completion, and therefore no rank: a completion by draws gives no probability of a
hidden cell.
"""

from paperback.compare.bench import Bench
from paperback.density.bench.contenders import CONTENDERS, epochs_for
from paperback.density.bench.data import DensityData, Table, companions, load
from paperback.density.bench.measure import METRICS, completion_scores, evaluate

__all__ = ["BENCH", "DensityData", "Table", "completion_scores", "epochs_for", "evaluate", "load"]

BENCH = Bench(
    task="density",
    metrics=METRICS,
    contenders=CONTENDERS,
    load=load,
    evaluate=evaluate,
    companions=companions,
    seconds={"smoke": 5, "quick": 20, "standard": 60, "full": 60},
)
