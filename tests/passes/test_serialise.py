"""Captures as JSON and back: the same graph, on the weights of the denoiser that it is restored for, or a refusal."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

from maskcompile.signature import bind
from passes.capture import CaptureError, capture, composite_modules, module_of
from passes.serialise import restore, serialise
from tests.denoisers import REFERENCE, TINY, denoiser
from tests.toys import Chain


def told(value):
    """What passes read of the meta of a node."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad
    return [told(part) for part in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", [*TINY, *REFERENCE])
def test_a_capture_is_what_it_was(name):
    case = denoiser(name)
    args, kwargs = case.inputs(case.batch, case.timesteps[0], 0)
    call = bind(case.model, args, kwargs)
    captured = capture(case.model, call.args, call.kwargs, composite_modules(case.model))
    document, constants = serialise(captured, case.model)
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    restored = restore(json.loads(json.dumps(document)), constants, other, call.args, call.kwargs)

    own = dict(other.named_parameters(remove_duplicate=False))
    weights = dict(restored.graph_module.named_parameters(remove_duplicate=False))
    buffers = dict(other.named_buffers(remove_duplicate=False))
    for path, buffer in restored.graph_module.named_buffers(remove_duplicate=False):
        assert path in constants or buffer is buffers[path]
    assert weights
    assert all(weight is own[path] for path, weight in weights.items())
    before, after = captured.graph_module.graph.nodes, restored.graph_module.graph.nodes
    for node, again in zip(before, after, strict=True):
        assert (node.name, node.op, node.target) == (again.name, again.op, again.target)
        assert str((node.args, node.kwargs)) == str((again.args, again.kwargs))
        assert module_of(node) == module_of(again)
        assert node.op == "output" or told(node.meta.get("val")) == told(again.meta.get("val"))
    for what in ("calls", "opaque", "names", "out_spec"):
        assert getattr(captured, what) == getattr(restored, what)
    assert captured.sample.name == restored.sample.name
    assert {n.name: macs for n, macs in captured.macs.items()} == {n.name: macs for n, macs in restored.macs.items()}

    args, kwargs = case.inputs(case.batch, case.timesteps[1], 1)  # nothing of the first call is left in it
    leaves = pytree.tree_leaves(((call := bind(other, args, kwargs)).args, call.kwargs))
    with torch.no_grad():
        ours = pytree.tree_leaves(Interpreter(restored.graph_module).run(*leaves, enable_io_processing=False))
        theirs = pytree.tree_leaves(other(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Table(nn.Module):
    """Makes a constant of its own, and takes numbers that JSON does not have."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4))

    def forward(self, sample, timestep):
        table = torch.tensor([1.0, float("inf"), -0.5, 2.0])
        return torch.clamp(self.first(sample), min=float("-inf")) * table.masked_fill(table == float("inf"), 3.0) + timestep


INPUTS = (torch.randn(2, 4), torch.tensor(3))


def stored(model):
    document, constants = serialise(capture(model, INPUTS, {}, composite_modules(model)), model)
    return json.loads(json.dumps(document)), constants


def test_constants_of_the_denoiser_are_kept():
    model = Table().eval()
    document, constants = stored(model)
    assert len(constants) == 1
    restored = restore(document, constants, model, INPUTS, {})
    sample = torch.randn(2, 4)
    (ours,) = pytree.tree_leaves(restored.graph_module(sample, torch.tensor(7)))
    assert torch.equal(ours, model(sample, torch.tensor(7)))


def change_another_value(document):
    next(node for node in document["nodes"] if "tanh" in node[2])[2] = "aten.sigmoid.default"


def change_to_no_operator(document):
    next(node for node in document["nodes"] if "tanh" in node[2])[2] = "aten.no_such_thing.default"


def change_a_weight(document):
    next(node for node in document["nodes"] if node[1] == "get_attr")[2] = "none.weight"


def change_an_argument(document):
    next(node for node in document["nodes"] if "tanh" in node[2])[3] = {"tuple": [{"node": "nobody"}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_another_value, "computes something else"),
        (change_to_no_operator, "no_such_thing"),
        (change_a_weight, "none.weight"),
        (change_an_argument, "nobody"),
        (lambda document: document.pop("nodes"), "nodes"),
    ],
)
def test_what_is_no_capture_of_the_denoiser_is_refused(change, said):
    torch.manual_seed(0)
    model = Chain().eval()
    document, constants = stored(model)
    change(document)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match=said):
        restore(document, constants, model, INPUTS, {})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("other", [Table(), Chain(8)])
def test_another_layout_is_refused(other):
    document, constants = stored(Chain().eval())
    inputs = (torch.randn(2, 4 if isinstance(other, Table) else 8), torch.tensor(3))
    with pytest.raises(CaptureError):
        restore(document, constants, other.eval(), inputs, {})


class Twice(nn.Module):
    """A block that returns a tensor at its first call, and nothing at its second."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4))
        self.b = Sometimes()

    def forward(self, sample, timestep):
        first = self.b(self.a(sample), True)
        self.b(first, False)
        return first + timestep


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, really):
        return self.inner(x) if really else None


def test_a_module_that_returns_a_tensor_once():
    model = Twice().eval()
    captured = capture(model, INPUTS, {}, composite_modules(model))
    restored = restore(*stored(model), model, INPUTS, {})
    assert captured.opaque == restored.opaque == {"b"}
    assert captured.calls == restored.calls
    assert {call.block for call in restored.calls} == {"a", "b"}


def test_a_capture_for_any_batch_is_not_kept():
    """Its graph does not say for which batches it holds."""
    model = Chain().eval()
    with pytest.raises(ValueError, match="any batch"):
        serialise(capture(model, INPUTS, {}, composite_modules(model), {0: 4}), model)
