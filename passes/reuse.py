"""Pass 4: reuse rules. What stands for a block's output at a step that reuses it.

With y_a the output at the last step a at which the block ran, y_b at the one before, and so on, step i gets the value at i of
the polynomial through the outputs at those steps: of degree 0 under *hold*, 1 under *linear*, 2 under *quadratic*. Written as

    y_a + sum_j c_j (y_a - y_j)        with c_j = -(Lagrange weight of y_j at i); for *linear* c = (i - a) / (a - b)

it is y_a itself where a block does not change. TaylorSeer (Liu et al. 2025, arXiv 2503.06923, eq. 6) forecasts from the same
differences, along the step index. Here distances are measured along the step index and, where it is known, along the log-SNR
of the steps; the clock on which step i is nearer, relative to the distance of a and b, counts. Features follow neither clock
everywhere, and the error of reaching too far is worse than that of reaching short: the log-SNR races through the first steps
of a run, whose differences say little about those that follow, and through its last ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, prod

#: rule -> how many computations before the last one it looks back to
RULES = {"hold": 0, "linear": 1, "quadratic": 2}

#: How far beyond the last computation a rule reaches at most, as a multiple of the distance of the last two. Past it: hold.
SAFE_REACH = 1.0


@dataclass(frozen=True)
class Recall:
    """How a reused output is made.

    steps: whose computations, newest first. coefficients: c_j of each but the newest. considered: the computations that
    decided it; more than ``steps`` where the rule would have reached too far.
    """

    steps: tuple[int, ...]
    coefficients: tuple[float, ...]
    considered: tuple[int, ...]


def recall(rule: str, ran: Sequence[int], step: int, log_snr: Sequence[float] | None = None) -> Recall:
    """What ``rule`` makes of a block at ``step``.

    ran: the steps of the run at which the block ran so far, rising, at least one. log_snr: of each step of the run, rising, NaN
    where unknown. A rule that lacks computations to look back to uses those that there are; one that would reach too far holds.
    """
    considered = tuple(ran[: -RULES[rule] - 2 : -1])
    if len(considered) == 1:
        return Recall(considered, (), considered)
    times = {at: float(at) for at in (step, *considered)}
    if log_snr is not None:
        logarithmic = {at: log_snr[at] for at in times}
        # A NaN compares as not nearer.
        if _reach(logarithmic, considered, step) < _reach(times, considered, step) and not any(
            map(isnan, logarithmic.values())
        ):
            times = logarithmic
    if _reach(times, considered, step) > SAFE_REACH:
        return Recall(considered[:1], (), considered)
    now = times[step]
    weights = (prod((now - times[k]) / (times[j] - times[k]) for k in considered if k != j) for j in considered[1:])
    return Recall(considered, tuple(-weight for weight in weights), considered)


def _reach(times: dict[int, float], considered: Sequence[int], step: int) -> float:
    last, before = times[considered[0]], times[considered[1]]
    return (times[step] - last) / (last - before)
