"""One reference method for each class of compression that the survey names, and the table that compares them.

`taxonomy` is the survey's tree, `methods` the same as a table, and `leaderboard` runs them on a model head
to head: bytes really written, quality on several texts, seconds, memory. The pruners are in
`paperback.compress.pruning`, truncated SVD in `paperback.compress.svd`; the others are here.

Source: Wang et al. (2024), Model Compression and Efficient Inference for Large Language Models: A Survey,
    arXiv
2402.09748. It has no experiments of its own; what it claims is that tuning-free methods come first for large
models, and that generality has to be measured.
"""

from paperback.compress.survey.awq import AWQ, round_clipped
from paperback.compress.survey.compact import GroupedQueries, merge_heads
from paperback.compress.survey.distil import Distil
from paperback.compress.survey.early_exit import DropBlocks, EarlyExit, attach_exits
from paperback.compress.survey.fake_quant_tune import FakeQuantTune
from paperback.compress.survey.gptq import GPTQ, gptq
from paperback.compress.survey.healing import Healing
from paperback.compress.survey.leaderboard import Leaderboard, leaderboard
from paperback.compress.survey.qlora import LoRALinear, QLoRA
from paperback.compress.survey.rtn import RTN
from paperback.compress.survey.smoothing import smoothing_pairs
from paperback.compress.survey.smoothquant import Int8Linear, SmoothQuant
from paperback.compress.survey.taxonomy import methods, taxonomy

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "Distil",
    "DropBlocks",
    "EarlyExit",
    "FakeQuantTune",
    "GroupedQueries",
    "Healing",
    "Int8Linear",
    "Leaderboard",
    "LoRALinear",
    "QLoRA",
    "SmoothQuant",
    "attach_exits",
    "gptq",
    "leaderboard",
    "merge_heads",
    "methods",
    "round_clipped",
    "smoothing_pairs",
    "taxonomy",
]
