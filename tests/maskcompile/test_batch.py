"""Other batch sizes: one capture and one compilation for all of them, with the results that each has by itself."""

from __future__ import annotations

import re
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod

import maskcompile as mc
from maskcompile import captures
from maskcompile import compile as compiling
from maskcompile.accounting import cost
from maskcompile.signature import bind, double_batch, other_batch
from passes.sizes import code_of, holds
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor
from tests.toys import Block, Chain

TIMESTEPS = (901, 701, 501, 301, 101)
MASK = [[1, 1], [0, 1], [0, 0], [1, 0], [0, 0]]


@pytest.fixture
def captured(monkeypatch):
    """One entry for each time that a denoiser is captured from here on: whether for any batch."""
    entries = []

    def counting(model, args, kwargs, marked, batch=None):
        entries.append(batch is not None)
        return capture(model, args, kwargs, marked, batch)

    capture = captures.capture
    monkeypatch.setattr(captures, "capture", counting)
    monkeypatch.setattr(captures, "_kept", WeakKeyDictionary())
    monkeypatch.setattr(captures, "_loadable", {})
    return entries


class Run:
    """A run of some batch under the mask of ``fast``, beside one of the executor."""

    def __init__(self, fast, case, batch, seed=0):
        mask = fast.mask
        self.fast, self.case, self.batch, self.seed = fast, case, batch, seed
        order = [int(rule == "linear") for rule in mask.reuse]
        self.executor = Executor(fast.original, mask.blocks, mask.compute, order)

    def all(self, close=False):
        for step in range(len(self.case.timesteps)):
            self.step(step, close)

    def step(self, step, close=False):
        args, kwargs = self.case.inputs(self.batch, self.case.timesteps[step], self.seed + step)
        ours = tensors_of(self.fast(*args, **kwargs))
        theirs = tensors_of(self.executor.step(step, *args, **kwargs))
        for mine, true in zip(ours, theirs, strict=True):
            if close:
                torch.testing.assert_close(mine, true)
            else:
                assert torch.equal(mine, true), (self.batch, step)


class Toy:
    """A denoiser of ``sample`` [batch, 4] and a timestep, as a case."""

    timesteps = TIMESTEPS

    def __init__(self, model):
        self.model = model.eval()

    def inputs(self, batch, timestep, seed):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, 4, generator=generator), torch.tensor(timestep)), {}


def optimized(case, blocks, compute, reuse="hold", **options):
    mask = mc.Mask(np.array(compute, dtype=bool), blocks=blocks, timesteps=case.timesteps, reuse=reuse)
    return mc.optimize(case.model, mask, **{"backend": "eager", **options})


def layers(model):
    """Paths of attention, feed-forward and ResNet modules, whatever the denoiser."""
    paths = [name for name, _ in model.named_modules()]
    return [
        p for p in paths if re.search(r"(\.attn\d?|\.ff\w*|resnets\.\d+|attentions\.\d+|single_transformer_blocks\.\d+)$", p)
    ]


# Three from the second batch on, as by default; three from the first, which is a capture less.
@pytest.mark.parametrize(
    ("name", "regions", "dynamic"),
    [
        ("unet2d", True, None), ("unet2d_condition", False, True), ("dit", False, None),
        ("pixart", True, True), ("sd3", True, None), ("flux", True, True),
    ],
)  # fmt: skip
def test_any_batch_is_exact_with_two_captures(name, regions, dynamic, captured):
    case = denoiser(name)
    blocks = layers(case.model)
    rng = np.random.default_rng(0)
    fast = optimized(case, blocks, rng.random((5, len(blocks))) < 0.5, regions=regions, dynamic=dynamic)
    for batch in (2, 3, 1, 8, 2):
        Run(fast, case, batch).all()
    compute = rng.random((5, len(blocks))) < 0.5
    fast.set_mask(mc.Mask(compute, blocks=blocks, timesteps=case.timesteps, reuse="linear"))
    for batch in (2, 8, 1, 3):
        Run(fast, case, batch, seed=5).all()
    assert fast.report().reusing_calls > 0
    assert captured == ([False, True] if dynamic is None else [True])
    assert [s.any_batch for s in fast.report().signatures] == [bool(dynamic), True, True, True]


def test_figures_are_those_of_each_batch():
    case = denoiser("dit")
    args, kwargs = case.inputs(2, case.timesteps[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    rng = np.random.default_rng(1)
    mask = mc.Mask(rng.random((5, len(program.names))) < 0.5, blocks=program.names, timesteps=case.timesteps, reuse="linear")
    fast = mc.optimize(case.model, mask, backend="eager", dynamic=True)
    for batch in (3, 1, 2, 8):
        args, kwargs = case.inputs(batch, case.timesteps[0], 0)
        fast.warmup(*args, **kwargs)
        fast(*args, **kwargs)
    alone = cost(program, mask)
    for batch, signature in zip((3, 1, 2, 8), fast.report().signatures, strict=True):
        # All of this denoiser is done for each picture.
        assert signature.full_macs * 2 == alone.full_macs * batch
        assert signature.macs * 2 == alone.macs * batch
        assert signature.peak_cache_bytes * 2 == alone.peak_cache_bytes * batch
    assert fast.cache_bytes == alone.cache_bytes[0] * 8 // 2


def test_batches_in_turn_within_a_step(captured):
    """As runs beside each other, which go on from the step at which their number is known."""
    case = Toy(Chain())
    fast = optimized(case, ["a", "b"], MASK, reuse="linear")
    for seed in (0, 20):
        begun = {batch: [] for batch in (3, 1, 2, 8)}
        for step in range(5):
            for batch, executors in begun.items():
                if step < 2:
                    executors.append(Executor(case.model, ["a", "b"], MASK, 1))
                args, kwargs = case.inputs(batch, TIMESTEPS[step], seed + step)
                ours = fast(*args, **kwargs)
                results = [executor.step(step, *args, **kwargs) for executor in executors]
                assert torch.equal(ours, results[-1])
    assert captured == [False, True]


@pytest.mark.parametrize("regions", [False, True])
def test_any_batch_from_the_first(regions, captured):
    """Also where that has a batch of 1, which says nothing about others."""
    for first in (1, 4):
        case = Toy(Chain())
        fast = optimized(case, ["a", "b"], MASK, reuse="linear", dynamic=True, regions=regions)
        for batch in (first, 3, 1, 6):
            Run(fast, case, batch).all()
        assert captured == [True]
        captured.clear()


def test_never_where_not_wanted(captured):
    case = Toy(Chain())
    fast = optimized(case, ["a", "b"], MASK, dynamic=False)
    for batch in (2, 3, 1, 2):
        Run(fast, case, batch).all()
    assert captured == [False] * 3
    assert not any(s.any_batch or s.alone for s in fast.report().signatures)


class Counting(Chain):
    """Does something else for each batch."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) * len(range(sample.shape[0]))


class Branching(Chain):
    """Does something else for large batches, and for small ones."""

    def forward(self, sample, timestep):
        x = super().forward(sample, timestep)
        return x * 2 if sample.shape[0] > 4 else x.flip(0) if sample.shape[0] == 1 else x - 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_denoiser_that_knows_its_batch_is_captured_for_each(dynamic, captured):
    case = Toy(Counting())
    fast = optimized(case, ["a", "b"], MASK, dynamic=dynamic)
    for batch in (2, 3, 1, 5, 3):
        Run(fast, case, batch).all()
    assert captured.count(False) == 4
    assert captured.count(True) == (1 if dynamic is None else 2)  # not tried over and over
    report = fast.report()
    assert not any(s.any_batch for s in report.signatures)
    assert "this one alone: Counting cannot be captured for any batch" in str(report)


def test_branches_on_the_batch_are_followed(captured):
    case = Toy(Branching())
    fast = optimized(case, ["a", "b"], MASK)
    for batch in (2, 3, 8, 1, 4, 6, 2):
        Run(fast, case, batch).all()
    assert len(captured) <= 5  # at 2, for 2 to 4, for more, and for 1


class Doubled(nn.Module):
    """Guidance within: what the first tensor has once is there twice in the others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block(4), Block(4)

    def forward(self, sample, timestep, text):
        time = timestep.float().reshape(-1, 1) / 1000
        x = self.a(torch.cat([sample, sample]) + text, time)
        with_text, without = self.b(x, time).chunk(2)
        return without + 3.0 * (with_text - without)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_batch_beside_its_double(dynamic, captured):
    case = Toy(Doubled())

    def inputs(batch, timestep, seed):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(2 * batch, 4, generator=generator)
        return (torch.randn(batch, 4, generator=generator), torch.full((2 * batch,), timestep)), {"text": text}

    case.inputs = inputs
    fast = optimized(case, ["a", "b"], MASK, dynamic=dynamic, regions=True)
    for batch in (3, 2, 4, 8):
        Run(fast, case, batch).all()
    assert captured == ([False, True] if dynamic is None else [True])


class Free(nn.Module):
    """Takes a table whose rows have nothing to do with the batch, though they may be as many."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block(4), Block(4)

    def forward(self, sample, timestep, table):
        x = self.a(sample, timestep.float().reshape(-1, 1) / 1000)
        return self.b(x + torch.softmax(x @ table.T, -1) @ table, timestep.float().reshape(-1, 1) / 1000)


@pytest.mark.parametrize("dynamic", [None, True])
def test_rows_that_are_no_batch(dynamic, captured):
    case, table = Toy(Free()), torch.randn(3, 4)
    plain = case.inputs
    case.inputs = lambda batch, timestep, seed: (plain(batch, timestep, seed)[0], {"table": table})
    fast = optimized(case, ["a", "b"], MASK, dynamic=dynamic)
    for batch in (3, 2, 1, 7):
        Run(fast, case, batch).all()
    assert len(captured) <= 3


@pytest.fixture
def compiled(monkeypatch):
    """Names of the regions that Inductor compiled from here on."""
    names = []

    def counting(graph_module, *args, **kwargs):
        names.append(graph_module)
        return standalone_compile(graph_module, *args, **kwargs)

    standalone_compile = compiling.standalone_compile
    monkeypatch.setattr(compiling, "standalone_compile", counting)
    monkeypatch.setattr(compiling, "_compiled", {})
    monkeypatch.setattr(compiling, "_loadable", {})
    return names


def test_nothing_is_compiled_for_a_third_batch(compiled, captured, tmp_path, monkeypatch):
    case = Toy(Chain())
    fast = optimized(case, ["a", "b"], MASK, reuse="linear", backend="inductor")
    Run(fast, case, 2).all(close=True)
    first = len(compiled)
    Run(fast, case, 3).all(close=True)
    second = len(compiled)
    assert 0 < second - first <= first
    for batch in (8, 5, 2, 3, 40):
        Run(fast, case, batch).all(close=True)
    assert len(compiled) == second
    assert captured == [False, True]
    # A batch of 1 may be compiled apart, once.
    Run(fast, case, 1).all(close=True)
    third = len(compiled)
    Run(fast, case, 1, seed=5).all(close=True)
    assert len(compiled) == third

    # What was compiled is as good in a file, with what it takes for granted.
    fast.save_compiled(tmp_path / "chain")
    monkeypatch.setattr(compiling, "_compiled", {})
    again = optimized(case, ["a", "b"], MASK, reuse="linear", backend="inductor", compiled=tmp_path / "chain")
    for batch in (2, 3, 8, 1, 5):
        Run(again, case, batch).all(close=True)
    assert len(compiled) == third


def test_what_a_compiler_takes_for_granted_of_a_batch_is_kept(compiled, monkeypatch):
    """As if Inductor had compiled for batches below 5, and for others when asked again."""
    case = Toy(Chain())

    def limited(environment, symbols, least):
        (symbol,) = symbols
        hint = int(symbol.xreplace(environment.backed_var_to_val))
        return (*guards_in(environment, symbols, least), symbol < 5 if hint < 5 else symbol >= 5)

    guards_in = compiling.guards_in
    monkeypatch.setattr(compiling, "guards_in", limited)
    fast = optimized(case, ["a", "b"], MASK, backend="inductor", dynamic=True)
    counts = []
    for batch in (3, 4, 8, 9, 2, 6):
        Run(fast, case, batch).all(close=True)
        counts.append(len(compiled))
    assert 0 < counts[0] == counts[1] < counts[2] <= 2 * counts[0]
    assert set(counts[2:]) == {counts[2]}


def test_what_inductor_cannot_compile_for_any_batch_is_compiled_for_each(monkeypatch):
    case = Toy(Chain())
    sizes = []

    def failing(graph_module, likes, **kwargs):
        if any(isinstance(like, torch.SymInt) for like in likes):
            raise NotImplementedError("sizes that are symbols")
        sizes.append([tuple(like.shape) for like in likes])
        return graph_module

    monkeypatch.setattr(compiling, "standalone_compile", failing)
    monkeypatch.setattr(compiling, "_compiled", {})
    fast = optimized(case, ["a", "b"], MASK, reuse="linear", backend="inductor", dynamic=True)
    counts = []
    for batch in (3, 2, 3, 2):
        Run(fast, case, batch).all(close=True)
        counts.append(len(sizes))
    assert counts[0] < counts[1] == counts[2] == counts[3]
    assert any((2, 4) in shapes for shapes in sizes)
    assert any((3, 4) in shapes for shapes in sizes)


@pytest.mark.parametrize("regions", [False, True])
def test_other_backends_compile_for_any_batch(regions, monkeypatch):
    monkeypatch.setattr(compiling, "_compiled", {})
    torch._dynamo.reset()
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    case = Toy(Chain())
    fast = optimized(case, ["a", "b"], MASK, reuse="linear", backend=backend, regions=regions, dynamic=True)
    Run(fast, case, 3).all(close=True)
    before = len(graphs)
    for batch in (2, 5, 8):
        Run(fast, case, batch).all(close=True)
    assert len(graphs) == before > 0


def test_one_code_for_guards():
    batch, other = sympy.symbols("s7 s8", integer=True, positive=True)
    code = code_of([batch < 16, sympy.Eq(Mod(batch, 2), 0), sympy.Ne(FloorDiv(other, 3), 1)], [batch, other])
    for values, expected in {(2, 1): True, (16, 1): False, (3, 1): False, (14, 4): False, (14, 6): True}.items():
        assert holds(code, values) is expected
    assert holds("", [])


def test_which_dimensions_are_the_batch():
    def key(*shapes):
        return bind(nn.Identity(), [[torch.zeros(shape) for shape in shapes]], {}).key

    assert other_batch(key((2, 4), (2,)), key((3, 4), (3,))) == {0: 3, 1: 3}
    assert other_batch(key((2, 4), (4,), (1, 2)), key((3, 4), (6,), (1, 2))) == {0: 3, 1: 6}
    assert other_batch(key((2, 4), (2,)), key((3, 4), (4,))) is None  # not by one factor
    assert other_batch(key((2, 4), (2,)), key((2, 5), (2,))) is None
    assert other_batch(key((2, 4)), key((2, 4), (2,))) is None
    assert other_batch(key((2, 4), ()), key((3, 4), ())) == {0: 3}
    assert double_batch(key((1, 4), (1,), (2, 3), (5,))) == {0: 2, 1: 2, 2: 4}


def test_a_batch_of_one_with_another_shape():
    """A denoiser that drops the batch where it is one: what was captured for others does not serve it."""

    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Sequential(nn.Linear(4, 4))

        def forward(self, sample, timestep):
            result = self.b(sample)
            return result[0] if sample.shape[0] == 1 else result

    model = Squeezing().eval()
    fast = mc.optimize(model, mc.Mask.full(["b"], [900, 100]), backend="eager")
    for batch in (2, 3, 1, 4, 1):
        x, t = torch.randn(batch, 4), torch.tensor(900)
        assert torch.equal(fast(x, t), model(x, t))
