"""A trained network made smaller or faster: any `torch.nn.Module` in, an ordinary module and a report out.

``Method(**settings).compress(model, data, budget)`` gives a `Compressed`: the model, and what it cost in
bytes really written, operations, latency and quality, layer by layer.
"""

from paperback.compress.budget import Budget
from paperback.compress.data import Data, evaluate, text_rows
from paperback.compress.interface import Compressed, Compressor, Estimate, Job, Streamed, load
from paperback.compress.report import Report

__all__ = [
    "Budget",
    "Compressed",
    "Compressor",
    "Data",
    "Estimate",
    "Job",
    "Report",
    "Streamed",
    "evaluate",
    "load",
    "text_rows",
]
