"""Make the table anew: ``python -m paperback.search.replay FILE``."""

import sys
from pathlib import Path

import torch

from paperback.search.replay import make_table, replay_space
from paperback.study.encoding import write_atomically
from paperback.study.progress import Bars

torch.set_num_threads(1)
if len(sys.argv) != 2:
    sys.exit("usage: python -m paperback.search.replay FILE")
configs = [walk.config for walk in replay_space().enumerate()]
table = make_table(Bars(True).track(configs, "models", len(configs)))
write_atomically(Path(sys.argv[1]), table.to_csv(index=False, float_format="%.6f"))
