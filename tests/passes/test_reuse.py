"""How reused outputs are made: by hand, and as properties of any history."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.reuse import FAINT, RULES, Recall, Rules, recall

HISTORIES = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True).map(sorted)


@pytest.mark.parametrize(
    ("rule", "ran", "step", "log_snr", "made"),
    [
        ("hold", [0, 3], 5, None, Recall(3)),
        ("linear", [4], 5, None, Recall(4)),
        ("linear", [0, 3], 5, None, Recall(3, 0, 2 / 3)),
        ("linear", [0, 1, 3], 4, None, Recall(3, 1, 0.5)),
        # No further than the last two computations are apart.
        ("linear", [3, 4], 9, None, Recall(4, 3, 1.0)),
        # The log-SNR puts step 3 nearer than the index does (1/4 against 1/2), and step 5 further.
        ("linear", [0, 2], 3, [-4.0, -1.0, 0.0, 1.0], Recall(2, 0, 0.25)),
        ("linear", [2, 4], 5, [-4.0, -1.0, 0.0, 1.0, 2.0, 5.0], Recall(4, 2, 0.5)),
        # Below FAINT all steps are alike: from -6 to -2 here, not from -40.
        ("linear", [0, 1], 2, [-40.0, -2.0, -1.0], Recall(1, 0, 0.25)),
        ("linear", [0, 1], 2, [-40.0, -20.0, -1.0], Recall(1, 0, 1.0)),
        # Unknown, as for a timestep that the mask does not know.
        ("linear", [0, 2], 3, [math.nan, -1.0, 0.0, 0.1], Recall(2, 0, 0.5)),
    ],
)
def test_by_hand(rule, ran, step, log_snr, made):
    assert recall(rule, ran, step, log_snr) == made
    assert recall(rule, ran, step, log_snr, 0.5) == replace(made, c=made.c / 2)
    assert recall(rule, ran, step, log_snr, 4.0) == replace(made, c=min(4 * made.c, 1.5))
    assert recall(rule, ran, step, log_snr, 0.0) == replace(made, c=0.0)


def test_rules_for_some_of_the_steps():
    rules = Rules(["hold", "linear"], [-4.0, -1.0, 0.0, 1.0], [1.0, 1.0, 0.5, 2.0])
    assert rules.at([0, 2, 3]) == Rules(["hold", "linear"], [-4.0, 0.0, 1.0])  # the reach was fitted to other gaps
    assert rules.at([2, 3]) == Rules(["hold", "linear"], [0.0, 1.0])  # and to what was stored before
    assert rules.at([0, 1, 2]) == Rules(["hold", "linear"], [-4.0, -1.0, 0.0], [1.0, 1.0, 0.5])
    assert Rules(["linear"]).at([None, 2]) == Rules(["linear"])
    unknown = rules.at([None, 1, 2])
    assert unknown.reach is None
    assert math.isnan(unknown.log_snr[0])
    assert unknown.recall(1, [0, 1], 2) == Recall(1, 0, 1.0)
    assert rules.recall(1, [0, 2], 3) == Recall(2, 0, 0.5)
    assert rules.recall(0, [0, 2], 3) == Recall(2)


@given(HISTORIES, st.integers(1, 20), st.lists(st.floats(0.01, 5), min_size=61, max_size=61), st.sampled_from(RULES))
def test_nothing_reaches_further_than_it_knows(ran, ahead, gaps, rule):
    """For any history, on any clock: between holding and the distance of the last two; never more with the log-SNR known."""
    log_snr = (np.cumsum(gaps) - 20).tolist()
    step = ran[-1] + ahead
    with_clock, without = recall(rule, ran, step, log_snr), recall(rule, ran, step)
    assert 0 <= with_clock.c <= without.c <= 1
    assert with_clock.last == without.last == ran[-1]
    assert (with_clock.before is None) == (rule == "hold" or len(ran) == 1)


@given(st.integers(1, 10), st.integers(1, 10), st.floats(-5, 5), st.floats(-5, 5))
def test_what_moves_in_a_straight_line_is_met_exactly(gap, ahead, offset, slope):
    made = recall("linear", [7, 7 + gap], 7 + gap + min(ahead, gap))
    before, last, truth = (offset + slope * at for at in (7, 7 + gap, 7 + gap + min(ahead, gap)))
    assert last + made.c * (last - before) == pytest.approx(truth, abs=1e-9)


def test_faint_is_a_sigma_of_twenty_alphas():
    assert pytest.approx(20, rel=0.01) == math.exp(-FAINT / 2)
