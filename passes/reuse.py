"""Pass 4: reuse rules. What stands for a block's output at a step that reuses it.

With y_a the output at the last step a at which the block ran, and y_b the one before that,

    hold      y_a
    linear    y_a + c (y_a - y_b)      c = min((i - a) / (a - b), 1) at step i

with distances measured along the step index and, where it is known, along the log-SNR of the steps; the smaller c of the two
counts. TaylorSeer (Liu et al. 2025, arXiv 2503.06923, eq. 6, order 1) forecasts along the step index alone. Features follow
neither clock everywhere, and reaching too far is worse than reaching short: the log-SNR slows down after the first steps of a
run, whose differences say little about what follows, and races through the last ones. Past c = 1 the extrapolated value is
held, which bounds what the rule can do where a mask leaves long gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

RULES = ("hold", "linear")

#: How far beyond the last computation *linear* reaches, as a multiple of the distance of the last two.
SAFE_REACH = 1.0

#: log-SNR below which a denoiser sees noise alone (sigma = 20 alpha), and its features do not change with the log-SNR.
FAINT = -6.0


@dataclass(frozen=True)
class Recall:
    """How a reused output is made: last: the step of y_a. before: that of y_b, None where y_a is held. c: see above."""

    last: int
    before: int | None = None
    c: float = 0.0


def recall(rule: str, ran: Sequence[int], step: int, log_snr: Sequence[float] | None = None) -> Recall:
    """What ``rule`` makes of a block at ``step``.

    ran: the steps of the run at which the block ran so far, rising, at least one. log_snr: of each step of the run, rising (or
    falling, for inversion), NaN where unknown. Nothing is extrapolated from a single computation.
    """
    if rule == "hold" or len(ran) == 1:
        return Recall(ran[-1])
    before, last = ran[-2:]
    reach = min((step - last) / (last - before), SAFE_REACH)
    if log_snr is not None:
        i, a, b = (max(log_snr[at], FAINT) for at in (step, last, before))
        known = not any(isnan(log_snr[at]) for at in (step, last, before))
        if known and a != b:  # equal where both are faint
            reach = min(reach, (i - a) / (a - b))
    return Recall(last, before, reach)
