"""The knowledge-guided rules on graphs in which what they must do can be read off, and their limits on random ones."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.dependencies import OUTPUT
from passes.knowledge import KNOWLEDGE, apply_knowledge, reused_consumers, reused_inputs

SAMPLE = "input:x"


def graph(*edges):
    found = nx.DiGraph()
    found.add_edges_from(edges)
    return found


CHAIN = graph((SAMPLE, "a"), ("input:t", "a"), ("a", "b"), ("input:t", "b"), ("b", "c"), ("input:t", "c"), ("c", OUTPUT))


def mask(*rows):
    return np.array([[c == "1" for c in row] for row in rows])


def test_a_block_that_would_see_only_a_new_time_is_reused():
    before = mask("111", "011", "111", "011")
    assert (reused_inputs(CHAIN, SAMPLE, "abc", before) == mask("111", "000", "111", "000")).all()


def test_a_block_whose_input_is_newer_than_itself_runs():
    # a was computed at step 1, b not: at step 2, b has not seen that a yet.
    before = mask("111", "100", "011")
    assert (reused_inputs(CHAIN, SAMPLE, "abc", before) == mask("111", "100", "011")).all()


def test_a_block_that_reads_the_sample_runs():
    assert reused_inputs(CHAIN, SAMPLE, "abc", mask("111", "100"))[1, 0]
    residual = graph((SAMPLE, "a"), ("a", "b"), (SAMPLE, "b"), ("b", OUTPUT))
    assert reused_inputs(residual, SAMPLE, "ab", mask("11", "01"))[1, 1]


def test_a_block_that_nothing_of_its_step_reads_is_reused():
    before = mask("111", "110", "101", "001")
    assert (reused_consumers(CHAIN, SAMPLE, "abc", before) == mask("111", "000", "001", "001")).all()


@pytest.mark.parametrize("names", [*([name] for name in KNOWLEDGE), list(KNOWLEDGE)])
@given(st.randoms(use_true_random=False), arrays(np.bool_, (5, 6)))
def test_rules_only_turn_computing_into_reusing(names, random, compute):
    blocks = [f"b{i}" for i in range(6)]
    nodes = [SAMPLE, *blocks, OUTPUT]
    found = graph(*((nodes[i], nodes[j]) for j in range(1, 8) for i in random.sample(range(j), k=random.randint(1, min(3, j)))))
    before = compute.copy()
    after = apply_knowledge(found, SAMPLE, blocks, compute, names)
    assert (compute == before).all()
    assert not (after & ~compute).any()
    assert (after[0] == compute[0]).all()
    assert (apply_knowledge(found, SAMPLE, blocks, after, names) == after).all()


def test_an_unknown_rule():
    with pytest.raises(KeyError, match="nearly"):
        apply_knowledge(CHAIN, SAMPLE, "abc", mask("111"), ["nearly"])
