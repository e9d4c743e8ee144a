"""The one training loop of the library, and the seeds that make a training repeatable.

`train` fits any module to tensors by gradient descent, in one process or in several under `accelerate
launch`.
"""

from paperback.training.history import History
from paperback.training.loop import train
from paperback.training.schedule import SCHEDULES, Schedule
from paperback.training.seeds import derive, generator, seeded

__all__ = ["SCHEDULES", "History", "Schedule", "derive", "generator", "seeded", "train"]
