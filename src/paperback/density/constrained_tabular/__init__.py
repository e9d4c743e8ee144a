"""Constrained tabular generation: rows that obey linear rules, every one of them.

A layer, compiled from inequalities such as ``max_price - min_price >= 0``, maps any row to one that satisfies
all of them, leaves rows alone that already do, and is differentiable almost everywhere. It stands inside the
training of a generator, between its output and its loss, or behind any generator as a guardrail. Eliminating
one column after the other (Fourier-Motzkin) turns the inequalities into bounds of each column by the columns
before it, in an order:

    CL(x)_i = min(max(x_i, lb_i(x_1 .. x_{i-1})), ub_i(x_1 .. x_{i-1})),   lb_i <= ub_i always.

Source: Stoian, Dyrmishi, Cordy, Lukasiewicz and Giunchiglia, How realistic is your synthetic data?
Constraining deep generative models for tabular data (ICLR 2024, arXiv 2402.04823); authors' code
mihaela-stoian/ConstrainedDGM.

What differs from the authors' code, and why:
- Coefficients are fractions, and elimination is exact. Their reduction adds the constants of two rows without
  scaling them by the ratio of the coefficients, and takes strictness from one of the two only.
- A set that no row satisfies is refused with the multiples of the constraints that contradict each other.
- Strict inequalities become ``>= margin`` before elimination, so that the theorem for closed sets covers
  them; theirs adds 1e-12 to bounds afterwards, which vanishes in float32.
- Satisfaction is judged relative to the size of a sum's terms, at 1e-9; theirs allows .01 in absolute terms.
- Rounded columns keep their decimals and satisfy the constraints all the same: elimination then leaves room
  for a rounded value (the dark shadow of the Omega test). Equalities, empty cells and completion given some
  columns are ours as well.
- In the VAE the correction is made in the modes of the row that is compared, not in those that the decoder
  finds most likely: the two amounts of a loss are then in the same units. Corrected amounts stay in [-1, 1].
- Disjunctions are not there; their code has an unfinished path for them.
"""

from paperback.density.constrained_tabular.constraints import LinearConstraints
from paperback.density.constrained_tabular.guard import guard, repair
from paperback.density.constrained_tabular.layer import ConstraintLayer
from paperback.density.constrained_tabular.model import ConstrainedTabular
from paperback.density.constrained_tabular.order import ORDERINGS, order_columns
from paperback.density.constrained_tabular.table import Encoding

__all__ = [
    "ORDERINGS",
    "ConstrainedTabular",
    "ConstraintLayer",
    "Encoding",
    "LinearConstraints",
    "guard",
    "order_columns",
    "repair",
]
