"""Images and tables as discrete states, and back.

`GreyBins` cuts the range of grey levels into bins of equal width. `TableBins` cuts numeric columns at their
quantiles, takes other columns by category, and gives missing cells a state of their own. Both are fitted on
the training part alone and saved as plain JSON (`to_dict`, `from_dict`).
"""

from paperback.data.discretise.grey import GreyBins
from paperback.data.discretise.table import TableBins

__all__ = ["GreyBins", "TableBins"]
