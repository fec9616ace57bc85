"""The passes one by one, on graphs small enough to work out by hand and on real denoisers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import maskcompile as mc
from passes.blocks import default_blocks
from passes.capture import CaptureError, Slot, capture, composite_modules
from passes.dependencies import OUTPUT, residual_blocks, slot_dependencies
from passes.plan import GraphKey, plan_run, share_graphs
from passes.rectify import rectify
from passes.reuse import Rules
from passes.specialise import specialise
from tests.architectures import architecture
from tests.denoisers import denoiser
from tests.executor import Executor
from tests.toys import Block, Chain

A, B, C = Slot("a", 0, 0), Slot("b", 0, 0), Slot("c", 0, 0)


@pytest.fixture(scope="module")
def chain():
    model = Chain().eval()
    found = capture(model, (torch.randn(2, 4), torch.tensor(500)), {}, composite_modules(model))
    return found, slot_dependencies(found, ["a", "b", "c"])


def plans(slots, *rows):
    return plan_run(slots, ["a", "b", "c"], np.array([[c == "1" for c in row] for row in rows]), Rules(["hold"] * 3))


def test_slot_dependencies_of_the_chain(chain):
    _, slots = chain
    assert slots.needs == {A: frozenset(), B: {A}, C: {A, B}, OUTPUT: {C}}
    # Two linear layers a block, 2 x 4 x 8 and 2 x 8 x 4.
    assert slots.macs_of([A]) == slots.macs_of([B]) == slots.macs_of([C]) == 2 * 2 * 4 * 8
    assert slots.total_macs == 3 * 2 * 2 * 4 * 8


@pytest.mark.parametrize(
    ("rows", "reads", "stores", "computed"),
    [
        # Reusing the last block makes the others dead, although the mask computes them.
        (["111", "110"], [(), (C,)], [(C,), ()], [("a", "b", "c"), ()]),
        # b is held over two steps; a is recomputed for c and not stored.
        (["111", "101", "101"], [(), (B,), (B,)], [(B,), (), ()], [("a", "b", "c"), ("a", "c"), ("a", "c")]),
        # a is computed at step 1 for nobody at that step (b, c reused), but read at step 2.
        (["111", "100", "011"], [(), (C,), (A,)], [(C,), (A,), ()], [("a", "b", "c"), ("a",), ("b", "c")]),
        # Nothing is there to reuse at the first step.
        (["000", "000"], [(), (C,)], [(C,), ()], [("a", "b", "c"), ()]),
        # A reuse that nobody reads (b under a reused c) is dropped, and b is not stored for it.
        (["111", "100", "111"], [(), (C,), ()], [(C,), (), ()], [("a", "b", "c"), (), ("a", "b", "c")]),
    ],
)
def test_liveness_by_hand(chain, rows, reads, stores, computed):
    _, slots = chain
    found = plans(slots, *rows)
    assert [tuple(slot for slot, _ in p.key.reads) for p in found] == reads
    assert [p.key.stores for p in found] == stores
    assert [p.computed for p in found] == computed
    assert not found[-1].held


def test_rectified_mask_by_hand(chain):
    _, slots = chain
    compute = np.array([[0, 1, 0], [1, 1, 0], [1, 0, 1]], dtype=bool)
    # Step 0 has nothing stored and computes all; at step 1 c is reused and a, b feed nobody, but step 2 reuses b.
    assert rectify(slots, ["a", "b", "c"], compute, Rules(["hold"] * 3)).tolist() == [
        [True] * 3,
        [True, True, False],
        [True, False, True],
    ]
    compute[2] = True
    assert rectify(slots, ["a", "b", "c"], compute, Rules(["hold"] * 3)).tolist() == [[True] * 3, [False] * 3, [True] * 3]


def test_plans_that_only_store_less_share_a_graph(chain):
    _, slots = chain
    found = plans(slots, "111", "101", "111")
    shared = share_graphs(found, {})
    assert [shared[plan.key] for plan in found] == [
        GraphKey((), (B,), 3 * 128),
        GraphKey(((B, 1),), (), 2 * 128),
        GraphKey((), (B,), 3 * 128),
    ]


def weights_of(graph_module):
    return {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}


@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition", "dit", "pixart", "sd3", "flux"])
def test_the_work_of_skipped_blocks_is_gone(name):
    case = denoiser(name)
    args, kwargs = case.inputs(2, case.timesteps[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    rng = np.random.default_rng(0)
    for trial in range(6):
        compute = np.ones((2, len(program.names)), dtype=bool)
        compute[1] = rng.random(len(program.names)) < trial / 6
        found = plan_run(program.slots, program.names, compute, Rules(["hold"] * len(program.names)))
        for own, key in share_graphs(found, {}).items():
            graph = specialise(program.capture, key)
            if own.reads:
                skipped = [b for b, c in zip(program.names, compute[1], strict=True) if not c]
                left = [w for w in weights_of(graph) if any(w.startswith(b + ".") for b in skipped)]
                assert not left
            assert not [n for n in graph.graph.nodes if "maskcompile.mark" in str(n.target) or "dropout" in str(n.target)]
            tensors = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            fake = tensors[0].fake_mode
            with fake, torch.no_grad(), FlopCounterMode(display=False) as counter:
                state = {k: fake.from_tensor(v) for k, v in [*graph.named_parameters(), *graph.named_buffers()]}
                torch.func.functional_call(graph, state, tuple(tensors))
            assert counter.get_total_flops() // 2 == own.macs


def test_all_reused_leaves_the_head_of_the_unet_alone():
    case = denoiser("unet2d")
    args, kwargs = case.inputs(2, 901, 0)
    program = mc.trace(case.model, *args, **kwargs)
    compute = np.array([[True], [False]]).repeat(len(program.names), 1)
    plan = plan_run(program.slots, program.names, compute, Rules(["hold"] * len(program.names)))[1]
    graph = specialise(program.capture, plan.key)
    assert weights_of(graph) == {f"{m}.{p}" for m in ("conv_norm_out", "conv_out") for p in ("weight", "bias")}


def test_a_denoiser_that_cannot_be_captured_is_named_with_its_operation():
    class Routing(nn.Module):
        def forward(self, x):
            return x[: int(x.sum().item()) % 2 + 1]

    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.router = nn.Linear(4, 4), Routing()

        def forward(self, sample, timestep):
            return self.router(self.first(sample)) if sample.sum() > -1e9 else sample

    model = Bad().eval()
    with pytest.raises(CaptureError, match=r"Bad cannot be captured: .*`.*sample\.sum\(\).*`"):
        mc.trace(model, torch.randn(2, 4), 5)
    assert not model._forward_hooks
    assert not model.router._forward_hooks


class Picking(nn.Module):
    """A block that computes only what a mask keeps, as HunyuanVideo's frame packing does with captions."""

    def __init__(self, returns_them):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
        self.returns_them = returns_them

    def forward(self, x, kept):
        at = kept.nonzero().squeeze(1)
        done = self.layers(x[:, at])
        return done if self.returns_them else x.index_copy(1, at, done)


class OfTheKept(nn.Module):
    def __init__(self, returns_them):
        super().__init__()
        self.first, self.second = Picking(False), Picking(returns_them)

    def forward(self, sample, timestep, kept):
        x = self.first(sample * (1 + timestep / 1000), kept)
        return x + self.second(x, kept).mean(1, keepdim=True)


@pytest.mark.parametrize("returns_them", [False, True])
def test_a_block_whose_shape_depends_on_values_is_no_block_of_a_graph(returns_them):
    """Within a block they may decide on shapes, but what a block returns is stored, and has to be known beforehand."""
    torch.manual_seed(0)
    model, times = OfTheKept(returns_them).eval(), (900.0, 500.0, 100.0)
    sample, kept = torch.randn(2, 6, 4), torch.tensor([1, 0, 1, 1, 0, 0])
    names = ("first", "second")
    program = mc.trace(model, sample, 900.0, kept, blocks=names)
    assert program.names == (names[:1] if returns_them else names)
    compute = np.array([[True, True], [False, True], [True, False]])
    mask = mc.Mask(compute, blocks=names, timesteps=times)
    if returns_them:
        with pytest.raises(mc.MaskError, match="decide on the shape or strides of what block 'second' returns"):
            mc.cost(program, mask)
    fast, executor = mc.optimize(model, mask, backend="eager"), Executor(model, names, compute)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*the shape or strides of what 'second' returns.*skipped module by module")
        for step, time in enumerate(times):
            expected = executor.step(step, sample, time, kept)
            assert torch.equal(fast(sample, time, kept), expected)
    assert bool(fast.report().uncaptured) == returns_them
    # Of the other block alone there is a graph, whatever is kept; and back again, of both there is none.
    fast.set_mask(mc.Mask(compute[:, :1], blocks=names[:1], timesteps=times))
    executor = Executor(model, names[:1], compute[:, :1])
    for step, (time, others) in enumerate(zip(times, (kept, 1 - kept, torch.ones_like(kept)), strict=True)):
        assert torch.equal(fast(sample, time, others), executor.step(step, sample, time, others))
    assert not fast.report().uncaptured
    fast.set_mask(mask)
    executor = Executor(model, names, compute)
    for step, time in enumerate(times):
        assert torch.equal(fast(sample, time, kept), executor.step(step, sample, time, kept))
    assert bool(fast.report().uncaptured) == returns_them
    assert fast.report().reusing_calls == 2


def test_what_a_forward_counts_is_no_change_where_blocks_have_no_graph():
    """The capture comes from ``trace``, so that no forward runs which would show what it changes by itself."""

    class Counting(OfTheKept):
        n = 0

        def forward(self, sample, timestep, kept):
            self.n += 1
            return super().forward(sample, timestep, kept)

    model, times, names = Counting(True).eval(), (900.0, 500.0), ("first", "second")
    kept, sample = torch.tensor([1, 0, 1]), torch.randn(2, 3, 4)
    mc.trace(model, sample, 900.0, kept)
    fast = mc.optimize(model, mc.Mask(np.ones((2, 2), dtype=bool), blocks=names, timesteps=times), backend="eager")
    with pytest.warns(UserWarning, match="skipped module by module"):
        fast(sample, 900.0, kept)
    for time in (500.0, 900.0, 500.0, 900.0):
        fast(sample, time, kept)
    assert fast.report().recaptures == 0


def test_what_is_written_through_data_is_captured():
    class Positions(nn.Module):
        """As CogVideoX makes them for pictures of another size than its own."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, timestep):
            positions = torch.arange(4, dtype=sample.dtype) * timestep
            joint = positions.new_zeros(4)
            joint.data[1:].copy_(positions[1:])
            return self.layer(sample) + joint

    model, sample = Positions().eval(), torch.randn(2, 4)
    program = mc.trace(model, sample, torch.tensor(5.0))
    with torch.no_grad():
        other = torch.randn(2, 4), torch.tensor(7.0)
        torch.testing.assert_close(program.capture.graph_module(*other), model(*other), rtol=0, atol=0)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_denoiser_that_writes_to_its_buffers_is_refused(through_data):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, sample, timestep):
            (self.calls.data if through_data else self.calls).add_(1)
            return self.layer(sample)

    model = Counting().eval()
    with pytest.raises(CaptureError, match="Counting writes to 'calls'"):
        mc.trace(model, torch.randn(2, 4), 5)
    assert model.calls == 0


def test_a_denoiser_that_writes_to_its_weights_is_refused():
    class Centring(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, timestep):
            self.layer.bias.data.copy_(sample.mean(0))
            return self.layer(sample)

    with pytest.raises(CaptureError, match=r"Centring writes to 'layer\.bias'"):
        mc.trace(Centring().eval(), torch.randn(2, 4), 5)


@pytest.mark.parametrize("reads_it", [False, True])
def test_an_assignment_to_data_is_not_captured(reads_it):
    """It would be lost, which shows at no input that it leaves as it is, as here at the first step."""

    class Clamping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, timestep):
            x = self.layer(sample) * timestep
            x.data = (x.data if reads_it else x.detach()).clamp(-4, 4)
            return x

    model, times = Clamping().eval(), (0.1, 9.0)
    mask = mc.Mask(np.ones((2, 1), dtype=bool), blocks=["layer"], timesteps=times)
    fast, sample = mc.optimize(model, mask, backend="eager"), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"`x\.data = .*: an assignment to \.data leaves no trace.*skipped module by module"):
        first = fast(sample, torch.tensor(0.1))
    with torch.no_grad():
        for time, ours in ((0.1, first), (9.0, fast(sample, torch.tensor(9.0)))):
            assert torch.equal(ours, model(sample, torch.tensor(time)))


def test_python_state_that_export_bakes_in_is_found_out():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 4), 0

        def forward(self, sample, timestep):
            self.calls += 1
            return self.layer(sample) * self.calls

    model = Alternating().eval()
    with pytest.raises(CaptureError, match="computes something else once captured"):
        mc.trace(model, torch.randn(2, 4), 5)


def test_tables_filled_while_tracing_do_not_stay_fake():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(4, 4), {}

        def forward(self, sample, timestep):
            if sample.shape not in self.table:
                self.table[sample.shape] = torch.arange(4.0)
            self.last = sample + 1
            return self.layer(sample + self.table[sample.shape])

    model = Lazy().eval()
    sample = torch.randn(2, 4)
    mc.trace(model, sample, 5)
    assert type(model.last) is torch.Tensor
    assert type(model.table[sample.shape]) is torch.Tensor
    assert torch.isfinite(model(sample, 5)).all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_both_products_of_attention_count(device):
    """By hand, on every device: projections of 3 x 5 x 8 numbers to 16, and for 2 heads of width 8, 5 x 5 scores and their sums."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 16, bias=False)

        def forward(self, sample, timestep):
            heads = self.project(sample * timestep).unflatten(-1, (2, 8)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(heads, heads, heads)

    model = Attention().eval().to(device)
    program = mc.trace(model, torch.randn(3, 5, 8, device=device), torch.ones((), device=device))
    assert program.macs == 3 * 5 * 8 * 16 + 3 * 2 * (5 * 5 * 8) * 2


class Conditioned(nn.Module):
    """A layer scaled by a condition that takes its form from the sample: one multiplication on the sample, two in all."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.scale, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.out(x) * self.scale(self.form(time, x))


class EndsConditioned(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.final = Conditioned(form)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        return self.final(self.block(sample), time)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "type_as": (lambda t, x: t.type_as(x), ["block"]),
    "expand_as": (lambda t, x: t.expand_as(x), ["block"]),
    "view_as": (lambda t, x: t.view_as(x), ["block"]),
    "reshape_as": (lambda t, x: t.reshape_as(x), ["block"]),
    "zeros_like": (lambda t, x: torch.zeros_like(x) + t, ["block"]),
    "full_like": (lambda t, x: torch.full_like(x, 2.0) * t, ["block"]),
    "new_ones": (lambda t, x: x.new_ones(x.shape[0], 4) * t, ["block"]),
    "a shape": (lambda t, x: t.expand(x.shape[0], 4), ["block"]),
    # What depends on the sample all the same.
    "its values": (lambda t, x: t + x, ["block", "final"]),
    "its values in another form": (lambda t, x: x.type_as(t), ["block", "final"]),
    "its values as a number": (lambda t, x: t.new_ones(t.shape[0], 4) * x.sum(), ["block", "final"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_takes_only_its_form_from_the_sample_does_not_depend_on_it(form):
    """Else the last layer of a denoiser is a block, and a step that reuses all blocks returns what the last one did."""
    function, blocks = FORMS[form]
    model = EndsConditioned(function).eval()
    inputs = torch.randn(2, 4), torch.randn(2, 4)
    assert list(mc.trace(model, *inputs).names) == blocks
    for_any_batch = capture(model, inputs, {}, composite_modules(model), {0: 2, 1: 2})
    assert default_blocks(for_any_batch, model) == blocks
    graph = mc.trace(model, *inputs, blocks=["block", "final.scale"]).dependencies
    assert graph.has_edge("block", "final.scale") == ("final" in blocks)


def test_a_uniform_mask_of_an_image_transformer_leaves_its_final_layer_alone():
    """Z-Image makes its time embedding of the dtype of the sample."""
    case = architecture("z_image")
    args, kwargs = case.inputs(2, 0.9, 0)
    program = mc.trace(case.model, *args, **kwargs)
    assert {name.rpartition(".")[2] for name in program.names} == {"attention", "feed_forward"}


class Wraps(nn.Module):
    """x -> a -> (b, residual or not) -> c -> d, with a skip connection from a to d around b and c."""

    def __init__(self, branch: str, skip: str) -> None:
        super().__init__()
        self.branch, self.skip = branch, skip
        self.a, self.b, self.c = Block(4), Block(4), Block(4)
        self.d = Block(8 if skip == "cat" else 4)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        a = self.a(sample, time)
        b = self.b(a, time)
        x = {"plain": b, "add": a + b, "blend": 0.3 * a + 0.7 * b}[self.branch]
        c = self.c(x, time)
        return self.d(torch.cat([c, a], -1) if self.skip == "cat" else c + a, time.repeat(1, 2) if self.skip == "cat" else time)


@pytest.mark.parametrize(
    ("branch", "skip", "residual"),
    [("plain", "cat", set()), ("plain", "add", set()), ("add", "cat", {"b"}), ("blend", "cat", {"b"})],
)
def test_residual_branches_are_told_from_skip_connections(branch, skip, residual):
    program = mc.trace(Wraps(branch, skip).eval(), torch.randn(2, 4), torch.randn(2, 4))
    assert program.names == ("a", "b", "c", "d")
    assert residual_blocks(program.capture, program.dependencies, "input:sample") == residual


@pytest.mark.parametrize(
    ("join", "residual"), [(lambda a, b: a + b, {"b"}), (lambda a, b: torch.cat([a, b], -1)[..., :4], set())]
)
def test_a_skip_around_one_block_is_no_residual_branch(join, residual):
    class Skip(Chain):
        def forward(self, sample, timestep):
            a = self.a(sample, timestep)
            return self.c(join(a, self.b(a, timestep)), timestep)

    program = mc.trace(Skip().eval(), torch.randn(2, 4), torch.randn(2, 4))
    assert residual_blocks(program.capture, program.dependencies, "input:sample") == residual
