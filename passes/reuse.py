"""Pass 4: reuse rules. What stands for a block's output at a step that reuses it.

With y_a the output at the last step a at which the block ran, and y_b the one before that,

    hold      y_a
    linear    y_a + c (y_a - y_b)      c = min((i - a) / (a - b), 1) at step i

with distances measured along the step index and, where it is known, along the log-SNR of the steps; the smaller c of the two
counts. TaylorSeer (Liu et al. 2025, arXiv 2503.06923, eq. 6, order 1) forecasts along the step index alone. Features follow
neither clock everywhere, and reaching too far is worse than reaching short: the log-SNR slows down after the first steps of a
run, whose differences say little about what follows, and races through the last ones. Past c = 1 the extrapolated value is
held, which bounds what the rule can do where a mask leaves long gaps.

A mask may know better how far to reach at each of its steps, from samples (``maskcompile.fit_reach``): its *reach* multiplies
c, 0 holds, and the bound is wider.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan

RULES = ("hold", "linear")

#: How far beyond the last computation *linear* reaches, as a multiple of the distance of the last two.
SAFE_REACH = 1.0

#: The same for a reach that was fitted.
FITTED_REACH = 1.5

#: The largest reach of a step: a factor of c, which the log-SNR may make small.
MOST_REACH = 4.0

#: log-SNR below which a denoiser sees noise alone (sigma = 20 alpha), and its features do not change with the log-SNR.
FAINT = -6.0


@dataclass(frozen=True)
class Rules:
    """How the outputs of blocks are reused in a run.

    of_block: the rule of each block. log_snr: of each step of the run, rising (or falling, for inversion), NaN where unknown.
    reach: of each step, at least 0.
    """

    of_block: Sequence[str]
    log_snr: Sequence[float] | None = None
    reach: Sequence[float] | None = None

    def at(self, steps: Iterable[int | None]) -> Rules:
        """For a run of these of the steps, None where it takes one that is not among them.

        A reach is fitted to what a run through all of the rows has stored: where one starts late, or leaves steps out, there
        is none.
        """
        taken = list(steps)
        log_snr = self.log_snr and [float("nan") if step is None else self.log_snr[step] for step in taken]
        reach = self.reach[: len(taken)] if self.reach and taken == list(range(len(taken))) else None
        return Rules(self.of_block, log_snr, reach)

    def recall(self, column: int, ran: Sequence[int], step: int) -> Recall:
        """See ``recall``, for the block of this column."""
        return recall(self.of_block[column], ran, step, self.log_snr, 1.0 if self.reach is None else self.reach[step])


@dataclass(frozen=True)
class Recall:
    """How a reused output is made: last: the step of y_a. before: that of y_b, None where y_a is held. c: see above."""

    last: int
    before: int | None = None
    c: float = 0.0


def recall(rule: str, ran: Sequence[int], step: int, log_snr: Sequence[float] | None = None, reach: float = 1.0) -> Recall:
    """What ``rule`` makes of a block at ``step``.

    ran: the steps of the run at which the block ran so far, rising, at least one. log_snr: of each step of the run, rising (or
    falling, for inversion), NaN where unknown. reach: of the step. Nothing is extrapolated from a single computation.
    """
    if rule == "hold" or len(ran) == 1:
        return Recall(ran[-1])
    before, last = ran[-2:]
    c = min((step - last) / (last - before), SAFE_REACH)
    if log_snr is not None:
        i, a, b = (max(log_snr[at], FAINT) for at in (step, last, before))
        known = not any(isnan(log_snr[at]) for at in (step, last, before))
        if known and a != b:  # equal where both are faint
            c = min(c, (i - a) / (a - b))
    return Recall(last, before, c if reach == 1 else min(reach * c, FITTED_REACH))
