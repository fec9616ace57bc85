"""Captures in files: taken for the denoiser that they are of, and for no other."""

from __future__ import annotations

import collections
import cProfile
import enum
import functools
import importlib
import math
import os
import random
import subprocess
import sys
import time
import types
import warnings
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import nn

import maskcompile as mc
from maskcompile import artefacts, captures
from maskcompile import digest as digests
from maskcompile.digest import digest
from tests.toys import Block, Chain, Processed

TIMESTEPS = (900, 100)


pytestmark = pytest.mark.usefixtures("counted")


def inputs(batch=2, timestep=900):
    return torch.randn(batch, 4), torch.tensor(timestep)


def optimise(model, **options):
    return mc.optimize(model, mc.Mask.full(["a", "b"], TIMESTEPS), backend="eager", **options)


def save(fast, path):
    files = captures.saved_captures(fast.original, [captured.capture for captured in fast._captures.values()])
    artefacts.save_artefacts(path, files, {})
    return files


def forget(monkeypatch):
    """As in another process."""
    monkeypatch.setattr(captures, "_kept", WeakKeyDictionary())


def gate(t):
    return torch.where(t < 500, 1.0, 1.0)


def _elsewhere():
    """The same function, of a file that is no module's."""
    namespace = {"torch": torch}
    exec(compile("def gate(t):\n    return torch.where(t < 500, 3.0, 1.0)\n", "/nowhere/patch.py", "exec"), namespace)
    return namespace["gate"]


another_gate = _elsewhere()


class Gated(Chain):
    def forward(self, sample, timestep):
        return super().forward(sample, timestep) * gate(timestep)


class Tabled(Chain):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.table = torch.linspace(1, 2, 1000)

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) * self.table[timestep.reshape(1)]


@pytest.mark.parametrize("kind", [Processed, Tabled])
def test_a_capture_of_a_file_is_taken(kind, counted, monkeypatch, tmp_path, recwarn):
    x = inputs()
    fast = optimise(kind().eval())
    fast(*x)
    files = save(fast, tmp_path / "chain")
    assert len(counted) == 1
    forget(monkeypatch)
    other = kind().eval()  # of other weights
    fast = optimise(other, compiled=tmp_path / "chain")
    assert torch.equal(fast(*x), other(*x))
    late = inputs(timestep=100)
    with torch.no_grad():
        other.b.up.weight.mul_(3)  # a capture has the weights themselves
        if kind is Tabled:
            other.table.mul_(2)
    assert torch.equal(fast(*late), other(*late))
    assert len(counted) == 1
    assert save(fast, tmp_path / "again") == files
    fast(*inputs(4))  # at which nothing was kept
    assert len(counted) == 2
    assert not [warning for warning in recwarn if warning.category is UserWarning]  # torch 2.11 warns of itself


def rescaled(model):
    model.processor.scale = 2.0


def hooked(model):
    model.a.register_forward_hook(lambda module, args, output: 2 * output)


def replaced(model):
    model.forward = functools.partial(lambda own, sample, timestep: own(sample, timestep) + 1, model.forward)


@pytest.mark.parametrize("change", [rescaled, hooked, replaced])
def test_a_capture_of_another_denoiser_is_not_asked_for(change, counted, monkeypatch, tmp_path, recwarn):
    x = inputs()
    fast = optimise(Processed().eval())
    fast(*x)
    save(fast, tmp_path / "chain")
    forget(monkeypatch)
    other = Processed().eval()
    change(other)
    fast = optimise(other, compiled=tmp_path / "chain")
    assert torch.equal(fast(*x), other(*x))
    assert len(counted) == 2
    assert not [warning for warning in recwarn if warning.category is UserWarning]  # torch 2.11 warns of itself


GAIN = 1.0


class Gaining(Chain):
    def forward(self, sample, timestep):
        return super().forward(sample, timestep) * GAIN


def test_a_stale_capture_is_refused(counted, monkeypatch, tmp_path):
    """What the digest does not tell, a variable of a module, the comparison with the denoiser does."""
    x = inputs()
    fast = optimise(Gaining().eval())
    fast(*x)
    save(fast, tmp_path / "chain")
    forget(monkeypatch)
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    other = Gaining().eval()
    fast = optimise(other, compiled=tmp_path / "chain")
    with pytest.warns(UserWarning, match="not used, and made afresh: Gaining computes something else"):
        result = fast(*x)
    assert torch.equal(result, other(*x))
    assert len(counted) == 2


def test_code_put_in_the_place_of_other_code(counted, monkeypatch, tmp_path):
    """As patches do, where the timestep of the comparison does not show it."""
    fast = optimise(Gated().eval())
    fast(*inputs())
    save(fast, tmp_path / "gated")
    forget(monkeypatch)
    monkeypatch.setitem(globals(), "gate", another_gate)
    other = Gated().eval()
    fast = optimise(other, compiled=tmp_path / "gated")
    with pytest.warns(UserWarning, match="not used, and made afresh: /nowhere/patch.py is no file of a module"):
        fast(*inputs())
    late = inputs(timestep=100)
    assert torch.equal(fast(*late), other(*late))


def test_the_code_that_operations_come_from(counted, monkeypatch, tmp_path):
    """A function of another file, edited so that the timestep of the comparison does not show it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(digests, "_STARTED", math.inf)  # as if the process began after these files were written
    gate = "import torch\n\ndef gate(t):\n    return torch.where(t < 500, {}, 1.0)\n"
    (tmp_path / "maskcompile_gates.py").write_text(gate.format(1.0))
    (tmp_path / "maskcompile_gated.py").write_text(
        "import maskcompile_gates\nfrom tests.toys import Chain\n\nclass Gated(Chain):\n"
        "    def forward(self, sample, timestep):\n"
        "        return super().forward(sample, timestep) * maskcompile_gates.gate(timestep)\n"
    )
    gated = importlib.import_module("maskcompile_gated")
    try:
        fast = optimise(gated.Gated().eval())
        fast(*inputs())
        save(fast, tmp_path / "gated")
        forget(monkeypatch)
        (tmp_path / "maskcompile_gates.py").write_text(gate.format(33.0))
        importlib.reload(sys.modules["maskcompile_gates"])
        model = gated.Gated().eval()
        fast = optimise(model, compiled=tmp_path / "gated")
        with pytest.warns(UserWarning, match="the code of maskcompile_gates is not what it was"):
            fast(*inputs())
        late = inputs(timestep=100)
        assert torch.equal(fast(*late), model(*late))
        assert len(counted) == 2
        forget(monkeypatch)
        monkeypatch.setattr(digests, "_STARTED", time.time() - 60)
        fast = optimise(model)
        fast(*inputs())
        with pytest.warns(UserWarning, match=r"every capture of Gated.*maskcompile_gate.*.py has been changed meanwhile"):
            assert not save(fast, tmp_path / "gated")
    finally:
        del sys.modules["maskcompile_gates"], sys.modules["maskcompile_gated"]


class Choice(enum.Enum):
    ONE = 1
    TWO = 2


class Private:
    def __init__(self, value):
        self._value = value


class Named(list):
    def __init__(self, values, name):
        super().__init__(values)
        self.name = name


def named(name):
    def function():
        return None

    function.name = name
    return function


def scaling(by):
    return lambda x: by * x


SETTINGS = {
    "numbers": (1, 1.0),
    "signs": (0.0, -0.0),
    "enumerations": (Choice.ONE, Choice.TWO),
    "partial functions": (functools.partial(nn.functional.gelu, approximate="tanh"), functools.partial(nn.functional.gelu)),
    "functions": (lambda x: x, lambda x: x + 1),
    "closures": (scaling(1), scaling(2)),
    "sets": ({1, 2}, {1, 3}),
    "objects": (Private(1), Private(2)),
    "methods": (Private(1).__init__, Private(2).__init__),
    "nested": ({"a": [{"_b": {"c": (1,)}}]}, {"a": [{"_b": {"c": (2,)}}]}),
    "tensors": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "built-in methods": (torch.Tensor.sigmoid, torch.Tensor.tanh),
    "bound ones": ((2.0).__mul__, (3.0).__mul__),
    "of containers": ({1: 2}.get, {1: 3}.get),
    "lists with attributes": (Named([1], "a"), Named([1], "b")),
    "functions with attributes": (named("a"), named("b")),
    "functions with sets": (lambda m: m in {"alpha", "beta", "gamma"}, lambda m: m in {"alpha", "beta", "delta"}),
    "classes": (Private, Choice),
}


def with_setting(value):
    torch.manual_seed(0)
    model = Chain()
    model.a.setting = value
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_differ(name):
    first, second = SETTINGS[name]
    assert digest(with_setting(first)) != digest(with_setting(second))


DIGESTS = """
from tests.denoisers import denoiser
from tests.maskcompile.test_saved_captures import SETTINGS, digest, with_setting
for first, second in SETTINGS.values():
    print(digest(with_setting(first)), digest(with_setting(second)))
for name in ("unet2d_condition", "flux", "timm_dit"):
    print(digest(denoiser(name).model))
"""


def test_digests_are_the_same_in_other_processes():
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", DIGESTS], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said[0] == said[1]
    assert len(set(said[0])) == len(said[0]) == 2 * len(SETTINGS) + 3


def test_modules_in_another_order():
    def listed(*order):
        torch.manual_seed(0)
        model, parts = Chain(), (Block(4), Block(4))
        model.more = nn.ModuleList(parts[place] for place in order)
        return digest(model)

    assert len({listed(0, 1, 0), listed(0, 1, 1), listed(0, 1)}) == 3


def test_a_class_that_was_changed(monkeypatch):
    before = digest(Chain())
    monkeypatch.setattr(Block, "forward", lambda self, x, time: x)
    assert digest(Chain()) != before


def test_weights_that_are_one():
    tied, untied = Chain(), Chain()
    tied.b.up.weight = tied.a.up.weight
    assert digest(tied) != digest(untied)
    assert digest(Chain()) == digest(untied)


class Slotted:
    __slots__ = ("value",)


@pytest.mark.parametrize(
    "value",
    [
        Slotted(),
        random.Random(0),
        collections.defaultdict(int),
        np.array([[]], dtype=object),
        nn.Linear(1, 1),
        functools.reduce(lambda inner, _: [inner], range(20), 0),
    ],
)
def test_what_cannot_be_told_is_not_kept(value, counted, tmp_path):
    model = Chain().eval()
    model.a.held = [value]
    fast = optimise(model)
    x = inputs()
    assert torch.equal(fast(*x), model(*x))
    with pytest.warns(UserWarning, match="the file has not every capture of Chain, and another process has to make it anew: "):
        assert not save(fast, tmp_path / "chain")


def test_a_denoiser_of_no_file_is_not_kept(counted, tmp_path):
    namespace = {"__name__": "nowhere", "Chain": Chain}
    exec("class Typed(Chain):\n    pass", namespace)  # as at a prompt
    fast = optimise(namespace["Typed"]().eval())
    fast(*inputs())
    with pytest.warns(UserWarning, match="the code of Typed is in no file"):
        assert not save(fast, tmp_path / "typed")


def test_weights_that_were_replaced_are_not_written(tmp_path):
    model = Chain().eval()
    fast = optimise(model)
    fast(*inputs())
    model.a.up.weight = nn.Parameter(model.a.up.weight * 2)
    with pytest.warns(UserWarning, match="'a.up.weight' has been replaced"):
        assert not save(fast, tmp_path / "chain")


class Turned(Chain):
    """With a constant of a dtype that safetensors does not have."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) + (torch.tensor([1j], dtype=torch.complex128) * 1j).real.float()


class Turning(Chain):
    def __init__(self):
        super().__init__()
        self.turn = torch.tensor([1j], dtype=torch.complex128)

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) + (self.turn * 1j).real.float()


@pytest.mark.parametrize(("kind", "kept"), [(Turned, False), (Turning, True)])
def test_constants_that_safetensors_cannot_hold(kind, kept, counted, monkeypatch, tmp_path):
    """They need not be in the file where they are the denoiser's own; otherwise there is none of it."""
    fast = optimise(kind().eval())
    x = inputs()
    fast(*x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        files = save(fast, tmp_path / "turned")
    assert (bool(files), len(caught)) == (kept, int(not kept))
    forget(monkeypatch)
    other = optimise(kind().eval(), compiled=tmp_path / "turned")
    assert torch.equal(other(*x), other.original(*x))
    assert len(counted) == 1 + (not kept)


class Labelled(Chain):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 4)

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) + self.embedding(timestep)


def test_a_call_that_fails_leaves_a_capture_where_it_is(counted, monkeypatch, tmp_path, recwarn):
    fast = optimise(Labelled().eval())
    fast(*inputs())
    save(fast, tmp_path / "turned")
    said = len(recwarn.list)
    forget(monkeypatch)
    fast = optimise(Labelled().eval(), compiled=tmp_path / "turned")
    with pytest.raises(RuntimeError, match="does not run on these inputs"):
        fast(torch.randn(2, 4), torch.tensor(5000))
    assert torch.equal(fast(*(x := inputs())), fast.original(*x))
    assert len(counted) == 1
    assert len(recwarn.list) == said


def test_a_damaged_capture_is_made_afresh(counted, monkeypatch, tmp_path):
    fast = optimise(Chain().eval())
    x = inputs()
    fast(*x)
    files = save(fast, tmp_path / "chain")
    for name, content in files.items():
        for damaged in (b"", b"[]", b"{}", content[: len(content) // 2]):
            if damaged == b"{}" and name.endswith(captures.CONSTANTS):
                continue
            forget(monkeypatch)
            captures.load_captures({**files, name: damaged})
            with pytest.warns(UserWarning, match="a capture in a file of save_compiled is not used"):
                result = optimise(fast.original)(*x)
            assert torch.equal(result, fast.original(*x))
            assert not captures._loadable


def test_under_a_profiler(counted, tmp_path):
    """Which goes on; what code ran is not known then."""
    model, x = Chain().eval(), inputs()
    fast = optimise(model)
    seen = []
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    try:
        fast(*x)
        still = len(seen)
        model(*x)
    finally:
        sys.setprofile(None)
    assert len(seen) > still
    with pytest.warns(UserWarning, match="a profiler was on"):
        assert not save(fast, tmp_path / "chain")
    profile = cProfile.Profile()
    assert torch.equal(profile.runcall(optimise(Processed().eval()), *x).isfinite().all(), torch.tensor(True))
    assert sys.getprofile() is None


def test_a_denoiser_that_fails_leaves_no_profiler(counted):
    with pytest.raises(RuntimeError, match="does not run on these inputs"):
        optimise(Labelled().eval())(torch.randn(2, 4), torch.tensor(5000))
    assert sys.getprofile() is None


class Lazy(types.ModuleType):
    @property
    def __dict__(self):
        raise ImportError("not installed")

    def __getattr__(self, name):
        raise ImportError("not installed")


def test_modules_that_must_not_be_looked_at(counted, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "maskcompile_lazy", Lazy("maskcompile_lazy"))
    fast = optimise(Chain().eval())
    x = inputs()
    assert torch.equal(fast(*x), fast.original(*x))
    assert save(fast, tmp_path / "chain")
