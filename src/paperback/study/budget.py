"""The four budgets of a run: how much of the paper's experiment is done.

``smoke`` takes seconds and tests the wiring. ``quick`` takes about a minute with one seed and is what a
newcomer sees. ``standard`` is the laptop study with all its seeds, the one that is judged and recorded.
``full`` comes as near to the paper as the hardware allows.
"""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

from paperback.errors import DataError

Budget = Literal["smoke", "quick", "standard", "full"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
JUDGED: frozenset[Budget] = frozenset({"standard", "full"})  # the budgets whose claims get a verdict

Value = TypeVar("Value")


def check_budget(name: str) -> Budget:
    """The budget of that name.

    Raises:
        DataError: if there is no such budget.
    """
    if name not in BUDGETS:
        raise DataError(f"there is no budget {name!r}; choose one of {', '.join(BUDGETS)}.")
    return name


def for_budget(
    budget: Budget,
    *,
    standard: Value,
    smoke: Value | None = None,
    quick: Value | None = None,
    full: Value | None = None,
) -> Value:
    """The value for this budget.

    One that is not given is that of the next larger budget; `full` falls back to `standard`.

    Args:
        budget: which budget the run has.
        standard: the value of the laptop study.
        smoke: for a check of the wiring; `quick` if not given.
        quick: for a first look; `standard` if not given.
        full: for a run near the paper's scale; `standard` if not given.

    Returns:
        One of the four values.
    """
    quick = standard if quick is None else quick
    smoke = quick if smoke is None else smoke
    full = standard if full is None else full
    return {"smoke": smoke, "quick": quick, "standard": standard, "full": full}[budget]
