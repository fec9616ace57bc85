"""Denoisers put together from compiled regions: what is compiled, how often, and how it is kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
import weakref
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor import standalone_compile
from torch._inductor.standalone_compile import CompiledArtifact
from torch.fx.experimental.proxy_tensor import make_fx

import maskcompile as mc
from maskcompile import artefacts, graphs
from maskcompile import compile as compiling
from passes.regions import region_graph, value_of
from tests.denoisers import TINY, denoiser, tensors_of
from tests.executor import Executor
from tests.toys import Chain

TIMESTEPS = (901, 701, 501, 301, 101)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def masks(program, count: int, reuse: str = "hold"):
    rng = np.random.default_rng(0)
    shape = len(TIMESTEPS), len(program.names)
    return [mc.Mask(rng.random(shape) < 0.5, blocks=program.names, timesteps=TIMESTEPS, reuse=reuse) for _ in range(count)]


@pytest.fixture
def compiled(monkeypatch):
    """Graphs given to the compiler from here on, by a backend that compiles nothing."""
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    monkeypatch.setattr(compiling, "_compiled", {})
    torch._dynamo.reset()
    return backend, graphs


def test_many_masks_compile_the_layers_once(compiled):
    """Of a DiT of two equal layers: one attention and one feed-forward, whatever the masks."""
    backend, graphs = compiled
    case = denoiser("dit")
    args, kwargs = case.inputs(2, TIMESTEPS[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    first, *others = masks(program, 5)
    fast = mc.optimize(case.model, first, backend=backend)
    fast.warmup(*args, **kwargs)

    def products(graph):
        return sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)

    for mask in others:
        fast.set_mask(mask)
        fast.warmup(*args, **kwargs)
        executor = Executor(case.model, program.names, mask.compute)
        for step, t in enumerate(TIMESTEPS):
            args, kwargs = case.inputs(2, t, step)
            for ours, theirs in zip(
                tensors_of(fast(*args, **kwargs)), tensors_of(executor.step(step, *args, **kwargs)), strict=True
            ):
                torch.testing.assert_close(ours, theirs)
    attention = [graph for graph in graphs if products(graph)]
    assert 1 <= len(attention) <= 2  # with the residual sum before it, or without, as in the first layer
    assert len(graphs) <= 13  # of the modulation one for each choice of its parts: both blocks, one, the other, none
    before = len(graphs)
    mc.optimize(case.model, first, backend=backend).warmup(*args, **kwargs)
    assert len(graphs) == before


def test_whole_graphs_where_asked(compiled):
    backend, graphs = compiled
    model = Chain().eval()
    mask = mc.Mask(np.array([[1, 1], [0, 1], [0, 0]], dtype=bool), blocks=["a", "b"], timesteps=(3, 2, 1))
    fast = mc.optimize(model, mask, backend=backend, regions=False)
    fast.warmup(latents(0), torch.tensor(3))
    assert len(graphs) == fast.report().signatures[0].graphs == 3
    assert "compiled in" in str(fast.report())


def test_weights_changed_in_place_are_followed(compiled):
    backend, _ = compiled
    model = Chain().eval()
    mask = mc.Mask.full(["a", "b"], TIMESTEPS)
    fast = mc.optimize(model, mask, backend=backend)
    fast(latents(0), torch.tensor(901))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    fast.reset()
    torch.testing.assert_close(fast(latents(0), torch.tensor(901)), model(latents(0), torch.tensor(901)))


@pytest.mark.parametrize("regions", [False, True])
def test_max_graphs(regions):
    """At most as many graphs, the results of the merged mask, and a report of its price."""
    case = denoiser("unet2d")
    args, kwargs = case.inputs(2, TIMESTEPS[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    (mask,) = masks(program, 1, reuse="linear")
    free = mc.optimize(case.model, mask, backend="eager", regions=regions)
    fast = mc.optimize(case.model, mask, backend="eager", regions=regions, max_graphs=2)
    for f in (free, fast):
        f.warmup(*args, **kwargs)
    of_all, of_few = (f.report().signatures[0] for f in (free, fast))
    assert of_all.graphs > 2 >= of_few.graphs == len(of_few.compile_seconds)
    assert of_few.macs > of_few.unmerged_macs == of_all.macs
    assert f"merged       adds {of_few.macs / of_all.macs - 1:.1%} to the MACs" in str(fast.report())
    assert "merged" not in str(free.report())
    merged, _ = fast._compute(next(iter(fast._captures)))
    assert fast.mask == mask
    executor = Executor(case.model, program.names, merged, 1)
    for step, t in enumerate(TIMESTEPS):
        args, kwargs = case.inputs(2, t, step)
        expected = executor.step(step, *args, **kwargs)
        for ours, theirs in zip(tensors_of(fast(*args, **kwargs)), tensors_of(expected), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="got max_graphs=0"):
        mc.optimize(case.model, mask, max_graphs=0)


@pytest.mark.parametrize("name", TINY)
def test_regions_get_what_they_were_compiled_for(name, monkeypatch):
    """Shapes, strides and dtypes: a compiler takes those of the captured graph for granted."""

    def checked(region, capture, backend, options):
        graph = region_graph(region, capture)
        likes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        (returned,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")

        def strides(tensor):
            return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]

        def run(*tensors):
            results = graph(*tensors)
            promised = [value_of(node, capture) for node in region.outputs]
            for tensor, like in zip((*tensors, *results), (*likes, *promised), strict=True):
                assert (tensor.shape, strides(tensor), tensor.dtype) == (like.shape, strides(like), like.dtype)
            return results

        assert len(returned) == len(region.outputs)
        return compiling.CompiledRegion(run, "", "")

    monkeypatch.setattr(graphs, "compile_region", checked)
    case = denoiser(name)
    args, kwargs = case.inputs(case.batch, TIMESTEPS[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    for reuse in ("hold", "linear"):
        for mask in masks(program, 4, reuse):
            fast = mc.optimize(case.model, mask, backend="eager", regions=True)
            for step, t in enumerate(TIMESTEPS):
                args, kwargs = case.inputs(case.batch, t, step)
                fast(*args, **kwargs)
            assert fast.report().reusing_calls > 0
            assert fast.report().signatures[0].regions


class Slice(nn.Module):
    """Blocks that return a part of a larger tensor, one tensor repeated, and one of another dtype."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(4, 8)), nn.Linear(4, 4)

        class Part(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x)[:, :4], x[:, :1].expand(-1, 4), x.double() * 2

        self.part = Part(self.a)

    def forward(self, sample, timestep):
        part, repeated, double = self.part(sample)
        return self.b(part + repeated) + double.float() * timestep


@pytest.mark.parametrize("regions", [False, True])
def test_parts_and_repetitions_and_two_precisions(regions):
    torch.manual_seed(0)
    model = Slice().eval()
    compute = [[True], [False], [True], [False], [False]]
    mask = mc.Mask(compute, blocks=["part"], timesteps=TIMESTEPS, reuse="linear")
    executor = Executor(model, ["part"], compute, 1)
    fast = mc.optimize(model, mask, backend="inductor" if regions else "eager", regions=regions)
    for step, t in enumerate(TIMESTEPS):
        x = latents(step)
        torch.testing.assert_close(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t)))


def test_what_cannot_be_divided_is_compiled_whole():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Sequential(nn.Linear(4, 4))

        def forward(self, sample, timestep):
            return self.b(sample) * timestep.item()

    model = Reading().eval()
    mask = mc.Mask([[True], [False]], blocks=["b"], timesteps=[2, 1])
    fast = mc.optimize(model, mask, backend="eager", regions=True)
    executor = Executor(model, ["b"], mask.compute)
    for step, t in enumerate((2, 1)):
        assert torch.equal(fast(latents(step), torch.tensor(t)), executor.step(step, latents(step), torch.tensor(t)))
    assert fast.report().signatures[0].regions is None


def test_weights_of_another_layout_are_another_capture():
    model = denoiser("unet2d").model
    case = denoiser("unet2d")
    args, kwargs = case.inputs(2, 901, 0)
    fast = mc.optimize(copy.deepcopy(model), mc.Mask.full(["mid_block.resnets.0"], TIMESTEPS), backend="eager", regions=True)
    fast(*args, **kwargs)
    fast.to(memory_format=torch.channels_last)
    fast(*args, **kwargs)
    assert fast.report().recaptures == 1


@pytest.mark.parametrize("asked", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_regions_leave_cuda_graphs_of_their_own_out(asked):
    """One that replays overwrites what the one before returned. Ours take their place, or graphs are compiled as a whole."""
    case = denoiser("unet2d")
    mask = mc.Mask.full(["mid_block.resnets.0"], TIMESTEPS)
    assert not mc.optimize(case.model, mask, cuda_graphs=False, **asked)._regions
    fast = mc.optimize(case.model, mask, cuda_graphs=True, **asked)
    assert fast._regions
    assert not compiling._inductor_options(fast._options)["triton.cudagraphs"]
    with pytest.raises(ValueError, match="regions cannot be CUDA graphs of torch's own"):
        mc.optimize(case.model, mask, regions=True, cuda_graphs=False, **asked)


def test_a_damaged_file_is_left_aside(tmp_path, monkeypatch):
    path = tmp_path / "x"
    monkeypatch.setattr(artefacts, "_loaded_kernels", list)  # of the tests before it, which would make the file large
    artefacts.save_artefacts(path, {"1" * 64: b"{}"}, {"0" * 64: b"what torch made"})
    assert artefacts.load_artefacts(path) == ({"1" * 64: b"{}"}, {"0" * 64: b"what torch made"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = artefacts.load_artefacts(path)
        assert found == ({}, {}) if caught else found in (({"1" * 64: b"{}"}, {"0" * 64: b"what torch made"}), ({}, {}))
    monkeypatch.setattr(compiling, "_loadable", {"k": b"junk"})
    with pytest.warns(UserWarning, match="damaged, and compiled afresh"):
        assert compiling._loaded("k") is None
    assert compiling._loaded("k") is None


CHILD = """
import sys, torch, maskcompile as mc
from torch._inductor import standalone_compile
from maskcompile import compile as compiling
from tests.executor import Executor
from tests.toys import Chain

what, path = sys.argv[1:]
calls, exports, export = [], [], torch.export.export
compiling.standalone_compile = lambda *args, **kwargs: calls.append(1) or standalone_compile(*args, **kwargs)
torch.export.export = lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs)
torch.manual_seed(0)
model = Chain().eval()
mask = mc.Mask([[True, True], [False, True], [False, False]], blocks=["a", "b"], timesteps=[3, 2, 1])
options = {"epilogue_fusion": False} if what == "other" else None  # nothing that was compiled serves
fast = mc.optimize(model, mask, compiled=None if what == "save" else path, options=options)
x = torch.ones(2, 4)
executor = Executor(model, mask.blocks, mask.compute)
for step, t in enumerate((3, 2, 1)):
    torch.testing.assert_close(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t)))
fast.save_compiled(path if what == "save" else f"{path}.{what}")
print("exported", len(exports), "compiled", len(calls))
"""


def test_another_process_takes_what_was_captured_and_compiled(tmp_path):
    """With a cache folder of its own, so that nothing else can help."""
    path = tmp_path / "chain.compiled"

    def run(what: str) -> tuple[int, int]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / what)}
        command = [sys.executable, "-W", "error::UserWarning:maskcompile", "-c", CHILD, what, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert "cannot save" not in done.stderr
        words = done.stdout.split()
        return int(words[1]), int(words[3])

    def content(file: str, folder: str) -> dict[str, bytes]:
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist() if name.startswith(folder)}

    exported, compiled = run("save")
    assert (exported, compiled > 0) == (1, True)
    assert run("load") == (0, 0)
    assert run("other") == (0, compiled)  # on the capture of the file, and what was compiled of it can be kept
    first, again, other = (content(file, "") for file in (path, f"{path}.load", f"{path}.other"))
    assert sys.platform != "linux" or any(name.startswith("kernels/") for name in again)
    assert sorted(again) == sorted(first)
    for folder in ("captures/", "regions/"):
        assert content(f"{path}.load", folder) == content(path, folder) != {}
    assert content(f"{path}.other", "captures/") == content(path, "captures/")
    regions = [[name for name in names if name.startswith("regions/")] for names in (first, other)]
    assert len(regions[0]) == len(regions[1])
    assert not set(regions[0]) & set(regions[1])
    assert not list((tmp_path / "load").glob("**/*.partial"))


def test_a_strange_file_is_left_aside(tmp_path):
    model = Chain().eval()
    mask = mc.Mask.full(["a"], TIMESTEPS)
    path = tmp_path / "x"

    def warned() -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fast = mc.optimize(model, mask, backend="eager", compiled=path)
        assert torch.equal(fast(latents(0), torch.tensor(901)), model(latents(0), torch.tensor(901)))
        (said,) = caught
        assert said.filename == __file__
        return str(said.message)

    assert "No such file" in warned()
    path.write_text("{}")
    assert "it is no file of save_compiled" in warned()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"format": artefacts.FORMAT, "torch": "1.0"}))
    assert f"it was made with torch 1.0, here it is {torch.__version__}" in warned()
    with pytest.raises(ValueError, match="call warmup"):
        mc.optimize(model, mask).save_compiled(path)
    with pytest.raises(ValueError, match="'inductor' can be saved"):
        mc.optimize(model, mask, backend="eager").save_compiled(path)


def test_a_region_that_returns_two_tensors():
    """An operation with several results, both of which leave the region."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4))
            self.b = nn.Sequential(nn.Linear(4, 4))

        def forward(self, sample, timestep):
            values, indices = self.a(sample).sort(dim=-1)
            return self.b(values) + indices, values

    model = Split().eval()
    compute = np.array([[True, True], [True, False], [False, True], [False, False]])
    fast = mc.optimize(model, mc.Mask(compute, blocks=["a", "b"], timesteps=TIMESTEPS[:4]), backend="eager", regions=True)
    executor = Executor(model, ["a", "b"], compute)
    for step, t in enumerate(TIMESTEPS[:4]):
        for ours, theirs in zip(
            fast(latents(step), torch.tensor(t)), executor.step(step, latents(step), torch.tensor(t)), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_denoiser_that_returns_a_weight_and_its_input():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))
            self.b = nn.Sequential(nn.Linear(4, 4))

        def forward(self, sample, timestep):
            return self.b(sample), self.weight, sample

    model = Plain().eval()
    fast = mc.optimize(model, mc.Mask([[True], [False]], blocks=["b"], timesteps=[2, 1]), backend="eager", regions=True)
    executor = Executor(model, ["b"], [[True], [False]])
    for step, t in enumerate((2, 1)):
        x = latents(step)
        for ours, theirs in zip(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t)), strict=True):
            assert torch.equal(ours, theirs)


def take_the_artefacts(monkeypatch):
    """Nothing is left of what Inductor returned but its code."""
    known = [region for several in compiling._compiled.values() for region in several]
    wrapped = [region for region in known if isinstance(region.artefact, CompiledArtifact)]
    assert wrapped

    def not_to_be_called(*arguments):
        raise AssertionError("the artefact was called")

    for region in wrapped:
        monkeypatch.setattr(region.artefact, "_compiled_fn", not_to_be_called)


def test_later_calls_do_without_the_wrappers_of_autograd(monkeypatch):
    """Inductor's code alone is called then, by all masks, and gives what the hook executor gives."""
    monkeypatch.setattr(compiling, "_compiled", {})
    case = denoiser("dit")
    args, kwargs = case.inputs(2, TIMESTEPS[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    first, second = masks(program, 2, "linear")
    fast = mc.optimize(case.model, first)

    def run(mask):
        fast.set_mask(mask)
        for step, t in enumerate(TIMESTEPS):
            args, kwargs = case.inputs(2, t, step)
            yield args, kwargs, tensors_of(fast(*args, **kwargs))

    for mask in (first, second):
        list(run(mask))
    take_the_artefacts(monkeypatch)
    for mask in (first, second):
        executor = Executor(case.model, program.names, mask.compute, order=1)
        for step, (args, kwargs, results) in enumerate(run(mask)):
            for ours, theirs in zip(results, tensors_of(executor.step(step, *args, **kwargs)), strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("how", ["any batch", "loaded"])
def test_so_do_regions_for_any_batch_and_those_of_a_file(how, monkeypatch, tmp_path):
    model = Chain().eval()
    model.gain = 2.0  # of 1, nothing is compiled
    mask = mc.Mask.full(["a", "b", "c"], [900, 100])
    monkeypatch.setattr(compiling, "_compiled", {})
    monkeypatch.setattr(compiling, "_loadable", {})
    fast = mc.optimize(model, mask, dynamic=how == "any batch")
    if how == "loaded":
        fast.warmup(latents(0), torch.tensor(900))
        fast.save_compiled(tmp_path / "chain")
        monkeypatch.setattr(compiling, "_compiled", {})
        monkeypatch.setattr(compiling, "_standalone", None)  # nothing is compiled
        fast = mc.optimize(model, mask, compiled=tmp_path / "chain")
    fast(latents(0), torch.tensor(900))
    take_the_artefacts(monkeypatch)
    for batch in (2, 2) if how == "loaded" else (2, 5):
        sample = torch.randn(batch, 4)
        torch.testing.assert_close(fast(sample, torch.tensor(100)), model(sample, torch.tensor(100)))


def artefact_of(function, inputs):
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    likes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    return standalone_compile(graph, likes, dynamic_shapes="from_graph", options={})


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda code: lambda x, y: [made + 1 for made in code(x, y)],
        lambda code: lambda x, y: code(x + 1, y),
        lambda code: lambda x, y: code(y, x),
        lambda code: lambda x, y: code(code(x, y)[0], y),
        lambda code: lambda x, y: code(x, y)[::-1],
        lambda code: lambda x, y: [x * y - 1, x + 1],
    ],
)
def test_wrappers_that_do_something_stay(wrapper):
    inputs = [torch.randn(4, 6) for _ in range(2)]
    artefact = artefact_of(lambda x, y: (x * y - 1, x + 1), inputs)
    wrapped = artefact._compiled_fn = wrapper(artefact._compiled_fn)
    outputs, later = compiling._inner(artefact, list(inputs))
    others = [torch.randn(4, 6) for _ in range(2)]
    for made, expected in ((outputs, wrapped(*inputs)), (later(list(others)), wrapped(*others))):
        for one, other in zip(made, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (x * y, x + 1),
        lambda x, y: (x.view(-1), x * y),  # shares memory with an input
        lambda x, y: (x, x * y),
        lambda x, y: (y * 2, x.add_(1)),  # changes one
        lambda x, y: ((x * y).view(-1), (x * y).t()),
    ],
)
def test_what_the_function_does_is_kept(function):
    """A later call does to its inputs, and returns, what the function does, memory that they share included."""

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(4, 6, generator=generator) for _ in range(2)]

    outputs, later = compiling._inner(artefact_of(function, inputs(0)), inputs(0))
    for seed, run in ((0, lambda _: outputs), (1, later), (2, later)):
        ours, theirs = inputs(seed), inputs(seed)
        made, expected = run(list(ours)), function(*theirs)
        for one, other in zip(made, expected, strict=True):
            torch.testing.assert_close(one, other)
            if seed:
                shares = [one.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in ours]
                assert shares == [other.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in theirs]
        if seed:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("whose", ["Inductor's", "another backend's"])
def test_a_region_lets_go_of_what_only_it_reads(whose, monkeypatch, compiled):
    """It is gone when the region returns, or is what the region returns."""
    outputs, gone, last, inner = [], [], {}, compiling._inner

    def watching(artefact, inputs):
        results, run = inner(artefact, inputs)

        def watched(inputs):
            last.update({n: len(gone) for n, output in enumerate(outputs) if any(output() is x for x in inputs)})
            made = run(inputs)
            gone.append({n for n, output in enumerate(outputs) if output() is None or any(output() is x for x in made)})
            outputs.extend(weakref.ref(tensor) for tensor in made)
            return made

        return results, watched

    monkeypatch.setattr(compiling, "_inner", watching)
    model = Chain().eval()
    backend = "inductor" if whose == "Inductor's" else compiled[0]
    fast = mc.optimize(model, mc.Mask.full(["a", "b", "c"], [900, 100]), backend=backend)
    fast(latents(0), torch.tensor(900))
    assert not outputs
    sample = latents(1)
    result = fast(sample, torch.tensor(100))
    torch.testing.assert_close(result, model(sample, torch.tensor(100)))
    assert len(last) > 2
    for output, call in last.items():
        assert output in gone[call]


@pytest.mark.usefixtures("counted")
def test_what_takes_no_kernel_is_no_obstacle_to_saving(monkeypatch, tmp_path):
    """Multiplied by 1, the result of c is as it was: Inductor compiles nothing, and keeps nothing."""
    monkeypatch.setattr(compiling, "_compiled", {})
    monkeypatch.setattr(compiling, "_loadable", {})
    model = Chain().eval()
    mask = mc.Mask.full(["a", "b", "c"], [900, 100])
    fast = mc.optimize(model, mask)
    fast.warmup(latents(0), torch.tensor(900))
    fast.save_compiled(tmp_path / "chain")
    monkeypatch.setattr(compiling, "_compiled", {})
    again = mc.optimize(model, mask, compiled=tmp_path / "chain")
    torch.testing.assert_close(again(latents(0), torch.tensor(900)), model(latents(0), torch.tensor(900)))


def test_what_torch_kept_nothing_of_cannot_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_compiled", {})
    fast = mc.optimize(Chain().eval(), mc.Mask.full(["a", "b", "c"], [900, 100]))
    with torch._inductor.config.patch(force_disable_caches=True):
        fast.warmup(torch.randn(2, 4), torch.tensor(900))
        with pytest.raises(ValueError, match=r"cannot be saved .*; compile with Inductor's caches on"):
            fast.save_compiled(tmp_path / "chain")
    assert not list(tmp_path.iterdir())
