"""The errors that a user can act on. Each message is one sentence that names the thing, the place and the
remedy.
"""


class PaperbackError(Exception):
    """Anything that paperback refuses on purpose. The command line prints its message without a traceback."""


class DataError(PaperbackError, ValueError):
    """Data, a mask or an argument that cannot be used as it is."""


class ArtefactError(PaperbackError):
    """A saved model or a recorded result that is corrupt, truncated, foreign or too new to be read."""


class NotSupportedError(PaperbackError):
    """An operation that this model does not have; the message names one that does."""


class MissingExtraError(PaperbackError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class BudgetError(DataError):
    """A size that cannot be met; the message names the range that can."""
