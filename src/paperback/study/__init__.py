"""Studies: a paper's central claims put to the test, with a report for people and a finding for programs.

A study is a function that takes a `Run`, asks it for sizes and seeds, and tells it what it found. `run_study`
runs one by the name of its method, `verify` runs several again and compares them with the record. Importing
this package imports no torch.
"""

from paperback.study.budget import BUDGETS, Budget
from paperback.study.claim import Claim, Verdict
from paperback.study.execute import run_study
from paperback.study.finding import Finding, read_run
from paperback.study.run import Run
from paperback.study.verify import verify

__all__ = ["BUDGETS", "Budget", "Claim", "Finding", "Run", "Verdict", "read_run", "run_study", "verify"]
