"""Lottery jackpots: a very sparse network inside a trained one, found by searching the mask alone.

No weight is ever changed. Each weight W has a score S; a layer keeps exactly k weights, B of 0 and 1 says
which. The forward pass computes with W ⊙ B, and gradients go straight through B to the scores,

    dL/dS := dL/dB = dL/d(B ⊙ W) ⊙ W.

After every step of SGD weights that the scores want more take the place of ones that they want less; with the
short restriction only the share beta_t of these exchanges is made, fewer and fewer.

The released code never restricts anything: one script wraps beta_t in a ceiling, the other computes it and
then returns 1. Here beta_t is as the paper writes it, and ``restriction=None`` is what the released code
does.

In the study here the search nearly recovers a small network from a tenth of its weights, training those
weights for as long is better by less than a point, and no restriction is as good as any.

Source: Zhang et al., Lottery Jackpots Exist in Pre-trained Models, TPAMI 2023 (arXiv 2104.08700), sections
3.2 to 3.4.
"""

from paperback.compress.lottery_jackpots.method import LotteryJackpots
from paperback.compress.lottery_jackpots.search import MaskSearch, exchange, restriction_at

__all__ = ["LotteryJackpots", "MaskSearch", "exchange", "restriction_at"]
