"""Data: small real sets that ship, and the user's own, as `Dataset` objects with fixed splits.

    from paperback.data import images, tables, text
    digits = images.digits()
    print(digits.describe())
    x, y = digits.train

`read` takes a path of the user's (a table, an ``.npz`` archive, a folder of images) and either returns a
`Dataset` or raises a `DataError` that says in one sentence what is wrong, where, and what to do. `GreyBins`
and `TableBins` turn images and tables into discrete states. Nothing is downloaded.
"""

from paperback.data import images, tables, text
from paperback.data.dataset import Dataset, Split
from paperback.data.discretise import GreyBins, TableBins
from paperback.data.dispatch import read

__all__ = ["Dataset", "GreyBins", "Split", "TableBins", "images", "read", "tables", "text"]
