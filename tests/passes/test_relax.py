"""The relaxed graph against module hooks, eager modules and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from passes.capture import capture, composite_modules
from passes.relax import blend, blendable, relax
from tests.denoisers import denoiser, tensors_of
from tests.toys import Chain, RandomDag


def blended_eagerly(model, scores, cached, args, kwargs):
    """The model with ``cached + score (output - cached)`` in the place of each block's output, by forward hooks."""
    calls: dict[str, int] = {}
    fresh, handles = {}, []

    def hook(name):
        def blend(module, args, output):
            call = calls[name] = calls.get(name, -1) + 1
            parts = [output] if isinstance(output, torch.Tensor) else list(output)
            for index, part in enumerate(parts):
                fresh[name, call, index] = part
                if (name, call, index) in cached:
                    old = cached[name, call, index]
                    parts[index] = old + scores[name] * (part - old)
            return parts[0] if isinstance(output, torch.Tensor) else type(output)(parts)

        return blend

    for name in scores:
        handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
    try:
        return tensors_of(model(*args, **kwargs)), fresh
    finally:
        for handle in handles:
            handle.remove()


def case(name):
    if name == "chain":
        torch.manual_seed(0)
        return Chain().eval(), ["a", "b", "c"], (torch.randn(2, 4), torch.tensor(500)), {}
    if name == "dag":
        model = RandomDag(3).eval()
        return model, model.names(), (torch.randn(2, 4), torch.tensor(500)), {}
    known = denoiser(name)
    args, kwargs = known.inputs(known.batch, known.timesteps[0], 0)
    blocks = {"unet2d": ["down_blocks.0.resnets.0", "mid_block.attentions.0"]}.get(name)
    return known.model, blocks or ["transformer_blocks.0.attn1", "transformer_blocks.1.ff"], args, kwargs


@pytest.mark.parametrize("name", ["chain", "dag", "unet2d", "dit"])
def test_it_blends_as_hooks_do(name):
    model, blocks, args, kwargs = case(name)
    captured = capture(model, args, kwargs, {*composite_modules(model), *blocks})
    slots, graph = blendable(captured, blocks), relax(captured, blocks)
    torch.manual_seed(1)
    scores = torch.rand(len(blocks))
    cached = {s: torch.randn(captured.marks[s].meta["val"].shape) for s in slots}
    inputs = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    with torch.no_grad():
        outputs = graph(*inputs, *cached.values(), scores, [True] * len(blocks))
        by_name = {(s.block, s.call, s.index): value for s, value in cached.items()}
        theirs, fresh = blended_eagerly(model, dict(zip(blocks, scores, strict=True)), by_name, args, kwargs)
    for ours, other in zip(outputs, theirs, strict=False):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    for slot, ours in zip(slots, outputs[len(theirs) :], strict=True):
        torch.testing.assert_close(ours, fresh[slot.block, slot.call, slot.index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["chain", "unet2d", "dit"])
def test_its_gradient_is_the_slope(name):
    model, blocks, args, kwargs = case(name)
    captured = capture(model, args, kwargs, {*composite_modules(model), *blocks})
    slots, graph = blendable(captured, blocks), relax(captured, blocks)
    inputs = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    torch.manual_seed(1)
    cached = [torch.randn(captured.marks[s].meta["val"].shape) for s in slots]

    def loss(scores):
        return graph(*inputs, *cached, scores, [True] * len(blocks))[0].double().square().mean()

    scores = torch.rand(len(blocks), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(scores), scores)
    with torch.no_grad():
        for index in range(len(blocks)):
            step = torch.zeros_like(scores)
            step[index] = 1e-2
            slope = (loss(scores + step) - loss(scores - step)) / 2e-2
            torch.testing.assert_close(gradient[index].double(), slope, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["chain", "dag", "unet2d", "dit"])
def test_a_block_that_reuses_takes_no_backward(name):
    """At a score of 0 nothing flows through the fresh output: the same slopes as by hooks, for fewer operations."""
    model, blocks, args, kwargs = case(name)
    captured = capture(model, args, kwargs, {*composite_modules(model), *blocks})
    slots, graph = blendable(captured, blocks), relax(captured, blocks)
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    inputs = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    torch.manual_seed(1)
    cached = {s: torch.randn(captured.marks[s].meta["val"].shape) for s in slots}
    drawn = [float(index % 2 == 0) for index in range(len(blocks))]

    def slope(outputs, scores):
        with FlopCounterMode(display=False) as counter:
            (found,) = torch.autograd.grad(outputs[0].double().square().mean(), scores)
        return found, counter.get_total_flops()

    results = {}
    for through in ([True] * len(blocks), [score != 0 for score in drawn]):
        scores = torch.tensor(drawn, requires_grad=True)
        results[all(through)] = slope(graph(*inputs, *cached.values(), scores, through), scores)
    scores = torch.tensor(drawn, requires_grad=True)
    by_name = {(s.block, s.call, s.index): value for s, value in cached.items()}
    hooked = blended_eagerly(model, dict(zip(blocks, scores, strict=True)), by_name, args, kwargs)[0]
    expected, _ = slope(hooked, scores)
    torch.testing.assert_close(results[False][0], expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(results[True][0], expected, rtol=1e-3, atol=1e-6)
    assert results[False][1] < results[True][1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_blending_is_what_autograd_makes_of_it(dtype, score):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 5, dtype=dtype) for _ in range(2)]

    def slopes(way):
        given = [t.clone().requires_grad_() for t in tensors] + [torch.tensor(score, requires_grad=True)]
        result = way(*given)
        weights = torch.linspace(-1, 1, 15, dtype=dtype).reshape(3, 5)
        return result, torch.autograd.grad((result * weights).sum(), given)

    ours, by_hand = slopes(lambda a, b, s: blend(a, b, s, True)), slopes(lambda a, b, s: b + (a - b) * s)
    assert torch.equal(ours[0], by_hand[0])
    for a, b in zip(ours[1], by_hand[1], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-2 if dtype.itemsize == 2 else 1e-6)
    if score == 0:
        pruned = slopes(lambda a, b, s: blend(a, b, s, False) + 0 * a)
        assert torch.equal(pruned[0], ours[0])
        assert torch.equal(pruned[1][0], torch.zeros_like(tensors[0]))
        assert all(torch.equal(a, b) for a, b in zip(pruned[1][1:], ours[1][1:], strict=True))
