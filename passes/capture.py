"""Pass 1: capture a denoiser as one functional ``torch.fx`` graph in which module outputs are marked.

``torch.export`` flattens a model into aten operations and forgets where a module's output is: a no-op on a block's input or
a tuple output makes it impossible to read that off the graph afterwards. Temporary forward hooks therefore pass every output
tensor of the marked modules through an identity operator, ``maskcompile::mark``, that survives export. In the captured graph
a mark node *is* the output of a block; later passes cut there, and none of them ever executes a mark.
"""

from __future__ import annotations

import inspect
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.macs import count_macs
from passes.sizes import Sizes, guards_of, is_size, read_at_the_inputs, solve, symbols_of
from passes.state import (
    Buffers,
    Change,
    buffers_of,
    changed,
    counted_on,
    kept_buffers,
    kept_state,
    put_back,
    restore_buffers,
    snapshot,
    undone,
)

_LIBRARY = torch.library.Library("maskcompile", "DEF")
_LIBRARY.define("mark(Tensor x, str block, int call, int index) -> Tensor")


@torch.library.impl(_LIBRARY, "mark", "CompositeExplicitAutograd")
def _mark(x: Tensor, block: str, call: int, index: int) -> Tensor:
    return x.clone()


@torch.library.register_fake("maskcompile::mark", lib=_LIBRARY)  # type: ignore
def _mark_fake(x: Tensor, block: str, call: int, index: int) -> Tensor:
    # The strides are kept: code after the mark may view where it could not view a contiguous copy, and the reverse.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


MARK = torch.ops.maskcompile.mark.default


class CaptureError(RuntimeError):
    """A denoiser could not be captured; the message names the operation and the module."""


@dataclass(frozen=True, order=True)
class Slot:
    """One output tensor of one call of a block within a step."""

    block: str
    call: int
    index: int

    def __str__(self) -> str:
        return self.block + (f"@{self.call}" if self.call else "") + (f"[{self.index}]" if self.index else "")


@dataclass(frozen=True)
class BlockCall:
    """One call of a marked module: its slots, and the calls of other marked modules that it happened within."""

    block: str
    call: int
    slots: tuple[Slot, ...]
    enclosing: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Capture:
    """A denoiser captured at one input signature, or at one for any batch.

    graph_module: functional aten graph with marks; its parameters are the model's own Parameter objects.
    inputs: the placeholder of each tensor leaf of ``(args, kwargs)``, in pytree order.
    names: a readable name for each of ``inputs``.
    sample: the input that carries the noisy sample, by convention the first tensor among the parameters of ``forward``.
    outputs: the leaves of the result, a Node or a constant each; ``out_spec`` puts them together again.
    calls: the marked module calls that returned tensors which the denoiser uses, in the order in which they returned.
    opaque: marked modules that were called and returned no tensor that pytree can see; they cannot be blocks.
    unsized: marked modules whose outputs have shapes or strides that the values of tensors decide on; nor can these.
    marks: the mark node of each slot.
    macs: multiply-accumulates of each node that has any.
    sizes: of the symbols in the shapes of the graph, at the call that it is looked at for; empty in a capture for one batch.
    guards: what it takes for granted of them. See ``passes.sizes``.
    code: the files of the Python code that the denoiser ran; None where a profiler was on, which alone can see that.
    """

    graph_module: GraphModule
    inputs: tuple[Node, ...]
    names: tuple[str, ...]
    sample: Node
    outputs: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    calls: tuple[BlockCall, ...]
    opaque: frozenset[str]
    unsized: frozenset[str]
    marks: Mapping[Slot, Node]
    macs: Mapping[Node, int]
    sizes: Sizes = field(default_factory=dict)
    guards: tuple[Any, ...] = ()
    code: frozenset[str] | None = None

    @property
    def cannot_reuse(self) -> frozenset[str]:
        """Marked modules that cannot be blocks."""
        return self.opaque | self.unsized


def composite_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that have children of their own, the root excepted: what may be a block by default."""
    return [name for name, module in model.named_modules() if name and next(module.children(), None) is not None]


def module_of(node: Node) -> tuple[str, ...]:
    """The module paths that ``node`` was executed in, outermost first, the root excepted."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path.split("@")[0] for path, _ in stack.values() if path]
    if not paths:
        # Export loses the stack within torch.autocast and torch.enable_grad; whose weights a node uses still tells.
        owners = (str(source.target).rpartition(".")[0] for source in node.all_input_nodes if source.op == "get_attr")
        paths = sorted({owner[:end] for owner in owners for end in _ends(owner)}, key=len)
    return tuple(paths)


def _ends(path: str) -> list[int]:
    """Where each prefix of a dotted path ends."""
    return [i for i, character in enumerate(path) if character == "."] + [len(path)] if path else []


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    marked: Iterable[str],
    batch: Mapping[int, int] | None = None,
) -> Capture:
    """Capture ``model(*args, **kwargs)`` with the outputs of the ``marked`` modules as marks.

    batch: capture for any batch: which tensors, by their positions in pytree order, have it as their first dimension, with what
    that is at another batch. The denoiser is captured at that other one where the given one is 1, and both are checked.

    The model is run once before (some denoisers fill tables of constants at their first call, which must not happen under
    fake tensors), and what that run leaves in its buffers and attributes stays. Tracing leaves no fake tensors there, and where
    the capture fails, what the run did is undone, but where it wrote to parameters. The captured graph is checked against it.

    Raises CaptureError when the denoiser cannot be exported, writes to its buffers or inputs, gives other values once captured,
    or depends on its batch or on what it keeps of earlier calls; whatever the model itself raises on these inputs is raised as
    it is.
    """

    def export(expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: Mapping[int, int]) -> Made:
        with _marking(model, set(marked)) as trail, _Traced():
            try:
                symbolic = _symbolic(args, kwargs, at)
                exported = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=symbolic)
                exported = exported.run_decompositions({})
            except (MemoryError, torch.OutOfMemoryError):  # says nothing about the denoiser
                raise
            except Exception as error:
                raise CaptureError(_describe(model, error, trail.open)) from error
        signature = exported.graph_signature
        mutated = signature.buffers_to_mutate, signature.parameters_to_mutate, signature.user_inputs_to_mutate
        if written := [name for names in mutated for name in names.values()]:
            raise CaptureError(
                f"{type(model).__name__} writes to {written[0]!r} in its forward; a captured graph must not have side effects."
            )
        graph_module = exported.module(check_guards=False)
        assert isinstance(graph_module, GraphModule)
        # Which way a reshape took is the fake tensor's, whose strides are not always those of what a kernel returns.
        for module in graph_module.modules():
            if isinstance(module, GraphModule):
                for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
                    node.target = torch.ops.aten.reshape.default
                module.recompile()
        out_spec = exported.call_spec.out_spec
        assert out_spec is not None
        return graph_module, out_spec, trail.calls, first_parameter(model, args, kwargs)

    return captured_at(model, args, kwargs, batch, export)


_DATA: Any = Tensor.data


class _Traced(TorchFunctionMode):
    """Makes ``tensor.detach()`` of ``tensor.data``, of which torch.export keeps no record; the same where no gradient is.

    Nor does it of an assignment, which nothing stands for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA.__set__:
            raise NotImplementedError("an assignment to .data leaves no trace in a graph")
        return args[0].detach() if func == _DATA.__get__ else func(*args, **(kwargs or {}))


#: A graph with marks, the structure of its outputs, the calls of marked modules, and which input carries the noisy sample.
Made = tuple[GraphModule, pytree.TreeSpec, Sequence[BlockCall], int]


def captured_at(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batch: Mapping[int, int] | None,
    make: Callable[[Any, tuple[Any, ...], dict[str, Any], Mapping[int, int]], Made],
    known: bool = False,
) -> Capture:
    """What ``capture`` does around exporting.

    make: (what the model returned, args, kwargs, positions of the tensors whose first dimension is to be a symbol) -> a graph.
    known: that the model does not go by what it keeps of earlier calls.
    """
    name = type(model).__name__
    given = {} if batch is None else {i: t.shape[0] for i, t in enumerate(_tensors(args, kwargs)) if i in batch}
    at, other = (batch, given) if batch is not None and 1 in given.values() else (given, batch)
    with torch.inference_mode(False), torch.no_grad():
        attributes = snapshot(model)
        buffers, weights = buffers_of(model, attributes), [(weight, _version(weight)) for weight in model.parameters()]
        of_run = None
        try:
            own_args, own_kwargs = _cloned(args, kwargs, at)
            with _noting_code() as code:
                expected = model(*own_args, **own_kwargs)
            of_run = changed(attributes)
            if any(_version(weight) != version for weight, version in weights):  # which is not undone; what goes with it stays
                of_run, buffers = [], {}
            own_args, own_kwargs = _cloned(args, kwargs, at)
            with kept_state(model):
                graph_module, out_spec, calls, sample = make(expected, own_args, own_kwargs, at)
            try:
                captured = _read(graph_module, own_args, own_kwargs, out_spec, calls, sample)
                _check(captured, own_args, own_kwargs, expected, name)
            except (CaptureError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of torch, which documents none
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CaptureError(f"{name} does not run once captured: {reason}") from error
            if of_run and not known:
                _check_again(captured, model, own_args, own_kwargs, of_run, buffers)
            if batch is not None:
                captured = _any_batch(captured, own_args, own_kwargs, name)
                own_args, own_kwargs = _cloned(args, kwargs, other or {})
                if sizes_of(captured, _tensors(own_args, own_kwargs)) is not None:
                    check_call(captured, model, own_args, own_kwargs)
        except BaseException:
            put_back(changed(attributes) if of_run is None else of_run)
            restore_buffers(buffers)
            raise
    return replace(captured, code=None if code is None else frozenset(code))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def _noting_code() -> Iterator[set[str] | None]:
    """The files of the Python code that this thread runs meanwhile; None under a profiler."""
    if sys.getprofile() is not None:
        yield None
        return
    files: set[str] = set()

    def note(frame: Any, event: Any, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and not (
            code.co_filename == "<string>" and code.co_name.startswith("__")
        ):  # dataclasses write these
            files.add(code.co_filename)

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


def sizes_of(captured: Capture, tensors: Sequence[Tensor]) -> dict[Any, int] | None:
    """The sizes of a call, given its tensors; None for a call that the capture does not serve.

    A capture for any batch is not known to serve one where a size is 1 until ``check_call`` says so.
    """
    return solve(captured.inputs, [tensor.shape for tensor in tensors], captured.guards)


def check_call(captured: Capture, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises CaptureError where the captured graph returns something else than the model for these arguments."""
    with torch.inference_mode(False), torch.no_grad():
        own_args, own_kwargs = _cloned(args, kwargs, {})
        with kept_buffers(model):
            expected = model(*own_args, **own_kwargs)
        own_args, own_kwargs = _cloned(args, kwargs, {})
        _check(captured, own_args, own_kwargs, expected, type(model).__name__)


#: Further calls that a denoiser is made to believe it has been through: a window of steps in which it does something else is
#: hardly between two of them.
_FURTHER = 1, 2, 4, 7, 12, 23, 45, 9973


def _check_again(
    captured: Capture,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    of_run: Sequence[Change],
    buffers: Buffers,
) -> None:
    """Raises CaptureError for a model that goes by what it keeps of an earlier call, as the graph would for ever.

    of_run, buffers: what a first run changed, and what was in buffers. That is undone, and the model run on other values, which
    are of the same range; then twice in a row from what it is now; and where it counts, as if it had been called more often.
    All is put back. An error of the model at values or counts that it would not come to says nothing.
    """
    if any(tensor.is_meta for tensor in _tensors(args, kwargs)):
        return
    others = None
    for vary in (_other, _other_real):
        try:
            others = pytree.tree_map(vary, (args, kwargs))
            own_args, own_kwargs = _cloned(others[0], others[1], {})
            with undone(model), kept_buffers(model):
                put_back(of_run)
                restore_buffers(buffers)
                expected = model(*own_args, **own_kwargs)
            own_args, own_kwargs = _cloned(others[0], others[1], {})
            _check(captured, own_args, own_kwargs, expected, type(model).__name__)
            break
        except (CaptureError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # of the model
            others = None
    if others is None:
        return
    try:
        with undone(model):
            check_call(captured, model, *others)
            check_call(captured, model, args, kwargs)
        for calls in _FURTHER:
            if not (later := counted_on(of_run, calls)):
                return
            with undone(model):
                put_back(later)
                check_call(captured, model, *others)
    except (CaptureError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # of the model
        return


def _other_real(leaf: Any) -> Any:
    return _other(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _other(leaf: Any) -> Any:
    """A tensor of other values in the same range: in reverse order, or half as large, or one half for 0.

    Integers in reverse order of the first dimension alone: along others, places of a table may not be those of the same one.
    """
    if not isinstance(leaf, Tensor) or leaf.dtype == torch.bool or leaf.is_complex():
        return leaf
    real = leaf.is_floating_point()
    reverse = leaf.flip(tuple(range(leaf.dim() if real else min(leaf.dim(), 1))))
    if not torch.equal(reverse, leaf):
        return reverse
    if not real:
        return torch.div(leaf, 2, rounding_mode="floor")
    return leaf / 2 if leaf.any() else torch.full_like(leaf, 0.5)


def constants(captured: Capture) -> set[int]:
    """Where in memory the tensors are that the graph holds, the model's parameters and others."""
    graph_module = captured.graph_module
    held = [attrgetter(str(node.target))(graph_module) for node in graph_module.graph.find_nodes(op="get_attr")]
    return {tensor.untyped_storage().data_ptr() for tensor in held if isinstance(tensor, Tensor)}


def resized(captured: Capture, sizes: Sizes) -> Capture:
    """The capture for a call of other sizes, with its multiply-accumulates."""
    return replace(captured, sizes=sizes, macs=count_macs(captured.graph_module, sizes))


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]


def _cloned(args: Sequence[Any], kwargs: Mapping[str, Any], rows: Mapping[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with clones of the tensors, of which those in ``rows`` have as many rows, repeated from the start.

    Clones, because export takes one tensor given twice for one input, and because the model may write to them.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for position, place in enumerate(places):
        tensor = leaves[place]
        if rows.get(position, 0) in (0, tensor.shape[0] if tensor.dim() else 0):
            leaves[place] = tensor.clone()
        else:
            times = -(-rows[position] // tensor.shape[0])
            leaves[place] = torch.cat([tensor] * times)[: rows[position]].clone()  # keeps the memory format
    cloned: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return cloned


def _symbolic(args: Sequence[Any], kwargs: Mapping[str, Any], at: Mapping[int, int]) -> Any:
    """What torch.export takes for the first dimensions of the tensors at these positions being symbols."""
    if not at:
        return None
    shapes = torch.export.ShapesCollection()
    for position, tensor in enumerate(_tensors(args, kwargs)):
        if position in at:
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    return shapes


def _any_batch(captured: Capture, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Capture:
    """A capture just made, with what is known of its symbols."""
    nodes = captured.graph_module.graph.nodes
    values = [node.meta["val"] for node in captured.inputs]
    try:
        if not symbols_of(values):
            raise ValueError("its forward is another one for each")
        read_at_the_inputs(captured.graph_module, captured.inputs)
        if symbols_of([node.meta.get("val") for node in nodes]) - symbols_of(values):
            raise ValueError("the values of its tensors decide on the shapes of others")
        if any(isinstance(leaf, Node) and is_size(leaf) for leaf in captured.outputs):
            raise ValueError("it returns that itself")
    except ValueError as error:
        raise CaptureError(f"{name} cannot be captured for any batch: {error}.") from None
    captured = replace(captured, guards=guards_of(values))
    sizes = sizes_of(captured, _tensors(args, kwargs))
    if sizes is None:
        raise CaptureError(f"{name} cannot be captured for any batch: what torch.export assumes is not even so at this one.")
    return resized(captured, sizes)


@dataclass
class _Trail:
    """What the marking hooks saw: marked calls that returned, and all module calls that are still open."""

    calls: list[BlockCall]
    open: list[tuple[str, int]]


@contextmanager
def _marking(model: nn.Module, marked: set[str]) -> Iterator[_Trail]:
    trail = _Trail([], [])
    counts: Counter[str] = Counter()
    handles = []
    thread = threading.get_ident()  # another one may call the model meanwhile

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if threading.get_ident() != thread:
                return
            if not name:
                trail.calls.clear()
                trail.open.clear()
                counts.clear()
            trail.open.append((name, counts[name]))
            counts[name] += 1

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            while trail.open and trail.open[-1][0] != name:  # calls that ended in an exception the model caught
                trail.open.pop()
            _, call = trail.open.pop()
            if name not in marked:
                return None
            leaves, spec = pytree.tree_flatten(output)
            slots: list[Slot] = []
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    slot = Slot(name, call, len(slots))
                    leaves[position] = MARK(leaf, name, call, slot.index)
                    slots.append(slot)
            enclosing = tuple((block, n) for block, n in trail.open if block in marked)
            trail.calls.append(BlockCall(name, call, tuple(slots), enclosing))
            return pytree.tree_unflatten(leaves, spec)

        return hook

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(module.register_forward_hook(leave(name)))
        yield trail
    finally:
        for handle in handles:
            handle.remove()


def _describe(model: nn.Module, error: Exception, open_calls: Sequence[tuple[str, int]]) -> str:
    """One sentence: the model, the module whose call did not return, the line of its code, and what torch said."""
    where = next((name for name, _ in reversed(open_calls) if name), "")
    place = f"module {where!r} ({type(model.get_submodule(where)).__name__})" if where else "its own forward"
    torch_folder = torch.__file__.rsplit("/", 1)[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(torch_folder) and f.line]
    frames = [f for f in frames if f.filename != __file__]
    operation = f" at `{frames[-1].line}`" if frames else ""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(model).__name__} cannot be captured: torch.export stopped in {place}{operation}: {reason}"


def _read(
    graph_module: GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out_spec: pytree.TreeSpec,
    calls: Sequence[BlockCall],
    sample: int,
) -> Capture:
    """Find inputs, outputs and marks in an exported module. sample: which of the tensor inputs carries the noisy sample."""
    nodes = graph_module.graph.nodes
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    placeholders = [node for node in nodes if node.op == "placeholder"]
    if len(placeholders) != len(leaves):
        raise CaptureError(f"the captured graph has {len(placeholders)} inputs where the call has {len(leaves)}.")
    inputs = tuple(p for p, leaf in zip(placeholders, leaves, strict=True) if isinstance(leaf, Tensor))
    (output,) = (node for node in nodes if node.op == "output")
    marks = {Slot(*node.args[1:]): node for node in nodes if node.target is MARK}
    given = symbols_of([node.meta["val"] for node in inputs])
    unsized = {slot.block for slot, node in marks.items() if symbols_of(node.meta["val"]) - given}
    marks = {slot: node for slot, node in marks.items() if slot.block not in unsized}
    # A slot without a mark was computed and thrown away by the model itself (a last block's second output, say).
    used = {(c.block, c.call): tuple(slot for slot in c.slots if slot in marks) for c in calls}
    kept = tuple(
        BlockCall(c.block, c.call, used[c.block, c.call], tuple(outer for outer in c.enclosing if used.get(outer)))
        for c in calls
        if used[c.block, c.call]
    )
    return Capture(
        graph_module=graph_module,
        inputs=inputs,
        names=tuple(node.name for node in inputs),
        sample=inputs[sample],
        outputs=tuple(pytree.tree_leaves(output.args[0])),
        out_spec=out_spec,
        calls=kept,
        opaque=frozenset(c.block for c in calls if not c.slots),
        unsized=frozenset(unsized),
        marks=marks,
        macs={} if any(symbols_of(node.meta["val"]) for node in inputs) else count_macs(graph_module),
    )


def first_parameter(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Which of the tensor leaves of ``(args, kwargs)`` comes first among the parameters of ``forward``.

    Keywords may be given in any order: a pipeline that names all of them does not name the sample first.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    leaves = pytree.tree_leaves(list(given.values()))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    return next((index for index, tensor in enumerate(tensors) if tensor is first), 0)


def _check(captured: Capture, args: Sequence[Any], kwargs: Mapping[str, Any], expected: Any, model_name: str) -> None:
    """The captured graph must return what the model returned; meta and fake tensors have no values to compare."""
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
        return
    actual = Interpreter(captured.graph_module).run(*leaves, enable_io_processing=False)
    pairs = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    shapes = [[leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves] for leaves in pairs]
    if shapes[0] != shapes[1]:
        raise CaptureError(f"{model_name} returns tensors of other shapes once captured: its forward depends on its batch.")
    for ours, theirs in zip(*pairs, strict=True):
        if not isinstance(theirs, Tensor) or torch.equal(ours, theirs):
            continue
        finite = theirs.isfinite()
        difference = (ours.float() - theirs.float())[finite].norm() / theirs.float()[finite].norm().clamp(min=1e-30)
        # On a CPU captures were bit-identical; GPU kernels chosen anew may round otherwise, in half precision by about 1e-3.
        exact = theirs.device.type == "cpu" and theirs.dtype in (torch.float32, torch.float64)
        if not torch.equal(finite, ours.isfinite()) or difference > (1e-5 if exact else 0.01):
            raise CaptureError(
                f"{model_name} computes something else once captured (relative difference {difference.item():.3g}): "
                "its forward depends on state or Python values that torch.export cannot see."
            )
