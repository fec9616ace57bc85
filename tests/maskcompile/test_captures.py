"""Captures that are kept: when one is taken again, and when not."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import queue
import threading
import warnings
import weakref
from collections import deque
from types import MethodType

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import maskcompile as mc
from maskcompile import captures
from maskcompile import compile as compiling
from passes.capture import _marking
from tests.toys import Chain, Processed

pytestmark = pytest.mark.usefixtures("counted")


def inputs(batch=2):
    return torch.randn(batch, 4), torch.tensor(900)


def full(model):
    return mc.Mask.full(["a", "b", "c"], [900, 100])


def test_tracing_and_optimising_capture_once(counted):
    model = Chain().eval()
    program = mc.trace(model, *inputs())
    for _ in range(2):
        fast = mc.optimize(model, mc.Mask.full(program.names, [900, 100]), backend="eager")
        fast(*inputs())
    assert len(counted) == 1


def changed(model, what):
    if what == "weight":
        model.a.up.weight = nn.Parameter(model.a.up.weight * 2)
    elif what == "setting":
        model.gain = 3.0
    else:
        model.processor.scale = 3.0


@pytest.mark.parametrize("what", ["weight", "setting", "processor"])
def test_what_was_changed_is_captured_again(what, counted):
    model = Processed().eval()
    mc.trace(model, *inputs())
    changed(model, what)
    x, t = inputs()
    assert torch.equal(mc.optimize(model, full(model), backend="eager")(x, t), model(x, t))
    assert len(counted) == 2


def test_nothing_is_kept_alive():
    model = Chain().eval()
    mc.trace(model, *inputs())
    weight = weakref.ref(model.a.up.weight)
    model.a.up.weight = nn.Parameter(torch.zeros_like(model.a.up.weight))
    mc.trace(model, *inputs(3))
    gc.collect()
    assert weight() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("itself", ["hook put on and removed", "compile", "forward", "child", "children"])
def test_a_denoiser_that_holds_itself_is_not_kept_alive(itself):
    model = Chain().eval()
    if itself.startswith("hook"):
        accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    elif itself == "compile":
        model.compile()
    elif itself == "forward":
        model.forward = MethodType(Chain.forward, model)
    else:
        model.a.owner = [model]
        model.b.owner = model.a.owner if itself == "children" else None
    mc.optimize(model, full(model), backend="eager")(*inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Controller:
    on, names = True, {"x"}

    def __init__(self) -> None:
        self.scales, self.table, self.inner = [1.0], np.ones(2), {"k": [{"deep": 1.0}]}


class Controlled(Chain):
    """Its settings lie deep in an object that two others hold, as attention controllers are held by processors."""

    def __init__(self) -> None:
        super().__init__()
        self.processor, self.names = Processor(), {"x"}
        self.processors = [self.processor, Processor(self.processor.controller)]

    def forward(self, sample, timestep):
        controller = self.processors[1].controller
        scale = controller.scales[0] * float(controller.table[1]) * controller.inner["k"][0]["deep"] * len(self.names)
        return super().forward(sample, timestep) * scale if controller.on else sample


class Processor:
    def __init__(self, controller=None) -> None:
        self.controller = controller or Controller()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.processor.controller.scales.append(2.0) or model.processor.controller.scales.reverse(),
        lambda model: setattr(model.processor.controller, "on", False),
        lambda model: model.processor.controller.inner["k"][0].update(deep=3.0),
        lambda model: model.processor.controller.table.__setitem__(1, 3.0),
        lambda model: model.names.add("y"),
        lambda model: setattr(model.processors[1], "controller", loud()),
    ],
)
def test_settings_deep_in_objects_are_looked_at(change, counted):
    model = Controlled().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    fast(*inputs())
    change(model)
    x, t = inputs()
    assert torch.equal(fast(x, t), model(x, t))
    fast(x, t)
    assert fast.report().recaptures == 1
    assert len(counted) == 2


def loud():
    controller = Controller()
    controller.scales = [5.0]
    return controller


# ---- what a forward keeps ---------------------------------------------------------------------------------------------------


class Keeping(Chain):
    """Keeps what it made of its first prompt until it is told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kept = nn.Linear(4, 4), None

    def forward(self, sample, timestep, prompt):
        if self.kept is None:
            self.kept = self.embed(prompt)
        return super().forward(sample + self.kept, timestep)


class Plain:
    def __init__(self, value) -> None:
        self.value = value


class Slotted:
    __slots__ = ("owner", "value")

    def __init__(self, value) -> None:
        self.value = value


def box(kind, value):
    """What a value is kept in, what reads it, what writes it."""
    made = {"dict": lambda: {"value": value}, "list": lambda: [value], "deque": lambda: deque([value])}.get(kind)
    if made is None:
        held = {"object": Plain, "slots": Slotted}[kind](value)
        return held, lambda: held.value, lambda other: setattr(held, "value", other)
    held, key = made(), "value" if kind == "dict" else 0
    return held, lambda: held[key], lambda other: held.__setitem__(key, other)


BOXES = ["dict", "list", "deque", "object", "slots"]
WITHIN = {"itself": lambda held: held, "in a dict": lambda held: {1: held}, "in an object": Plain, "in slots": Slotted}


class EveryThird(Chain):
    """A step cache of its own, and the number of its calls."""

    def __init__(self, kind, within) -> None:
        super().__init__()
        held, self.read, self.write = box(kind, (0, None))
        self.state = WITHIN[within](held)

    def forward(self, sample, timestep):
        count, kept = self.read()
        kept = kept if count % 3 else super().forward(sample, timestep)
        self.write((count + 1, kept))
        return sample + kept


class Tabulating(Chain):
    """Fills a table that depends on no values at its first call."""

    def __init__(self, kind, within) -> None:
        super().__init__()
        self.frequency, self.calls = 1.0, 0
        held, self.read, self.write = box(kind, None)
        self.state = WITHIN[within](held)

    def forward(self, sample, timestep):
        self.calls += 1
        if self.read() is None:
            self.write(torch.arange(4.0) * self.frequency)
        return super().forward(sample + self.read(), timestep)


def test_a_denoiser_that_keeps_its_prompt_is_not_captured(counted):
    model = Keeping().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    with pytest.warns(UserWarning, match="its forward depends on state or Python values"):
        fast(*inputs(), torch.randn(2, 4))
    for _ in range(2):
        model.kept, prompt = None, torch.randn(2, 4)
        for timestep in (900, 100):
            x, t = torch.randn(2, 4), torch.tensor(timestep)
            assert torch.equal(fast(x, t, prompt), model(x, t, prompt))
    assert fast.report().uncaptured


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("kind", BOXES)
def test_a_denoiser_with_a_step_cache_of_its_own_is_not_captured(kind, within):
    model = EveryThird(kind, within).eval()
    with pytest.raises(mc.CaptureError, match="depends on state"):
        mc.trace(model, *inputs())
    model.write((0, None))
    fast = mc.optimize(model, full(model), backend="eager")
    x, t = inputs()
    with pytest.warns(UserWarning, match="skipped module by module"):
        fast(x, t)
    for _ in range(2):
        x = torch.randn(2, 4)
        model.write((0, None))
        ours = fast(x, t)
        model.write((0, None))
        assert torch.equal(ours, model(x, t))


class Scaled(Chain):
    """A setting beside what its forward keeps."""

    def __init__(self, kind, within) -> None:
        super().__init__()
        held, self.read, self.write = box(kind, 1.0)
        self.state, self.notes = WITHIN[within](held), {"calls": 0, "gain": 2.0}

    def forward(self, sample, timestep):
        self.notes["calls"] += 1
        scale = self.read()
        return super().forward(sample, timestep) * (0.5 if scale != scale else scale) * self.notes["gain"]


@pytest.mark.filterwarnings("ignore:.*is set anew time and again")
@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("kind", BOXES)
def test_settings_are_looked_at_wherever_they_are(kind, within, counted):
    model = Scaled(kind, within).eval()
    fast = mc.optimize(model, full(model), backend="eager")
    changes = [lambda: None, lambda: model.write(3.0), lambda: model.notes.update(gain=5.0)]
    changes += [lambda: model.write(float("nan")), lambda: None, lambda: model.write(4.0)]
    for change in changes:
        change()
        x, t = inputs()
        assert torch.equal(fast(x, t), model(x, t))  # which counts, too
    assert fast.report().recaptures == 4
    assert len(counted) == 5


class Growing(Chain):
    """Keeps more and more of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.table, self.shapes, self.inner = [], {}, {}, Plain(deque(maxlen=2))

    def forward(self, sample, timestep):
        self.history.append(sample.shape)
        self.table[len(self.table)] = 1
        self.shapes.setdefault(tuple(sample.shape), object())
        self.inner.value.append(len(self.history))
        return super().forward(sample, timestep)


def test_what_grows_with_every_call_changes_nothing():
    model = Growing().eval()
    fast = mc.optimize(model, full(model), backend="eager", dynamic=False)
    for batch in (2, 2, 2, 3, 2, 5, 2):
        x, t = inputs(batch)
        if batch == 2:
            assert torch.equal(fast(x, t), model(x, t))
        model(x, t)
    assert fast.report().recaptures == 0


def test_what_other_threads_do_meanwhile_is_left(counted):
    """A worker that waits for what a denoiser hands it, loggers, locks."""
    model = Chain().eval()
    model.queue, model.wake, model.log = queue.Queue(), threading.Event(), logging.getLogger("maskcompile.test")
    loggers, done, puts = [], [], itertools.count()

    def work():
        while (one := model.queue.get()) is not None:
            done.append(one)
            model.queue.task_done()

    def tracing(handed):
        model.queue.put(1)
        next(puts)
        loggers.append(logging.getLogger(f"maskcompile.test.{len(loggers)}"))
        model.wake.wait(0.001)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    model.b.register_forward_pre_hook(lambda module, handed: tracing(handed))
    fast = mc.optimize(model, full(model), backend="eager")
    fast(*inputs())
    written = next(puts)
    assert written > 1
    model.queue.join()
    assert done == [1] * written
    model.queue.put(2)
    model.queue.put(None)
    worker.join(timeout=60)
    assert done[-1] == 2
    assert all(logging.getLogger(logger.name) is logger for logger in loggers)
    for number in range(3):
        logging.getLogger(f"maskcompile.another.{number}")
        fast(*inputs())
    assert fast.report().recaptures == 0


def test_what_modules_share_is_shared_after_a_capture():
    """torch.export puts copies of dicts and lists in their place."""
    model = Chain().eval()
    model.a.shared = model.b.shared = shared = {"x": [1.0]}
    model.names = names = ["a"]
    mc.trace(model, *inputs())
    assert model.a.shared is model.b.shared is shared
    assert shared["x"] == [1.0]
    assert model.names is names


class Property(Slotted):
    __slots__ = ()

    @property
    def value(self):
        return [2.0]

    @value.setter
    def value(self, other):
        raise AttributeError("it cannot be set")


@pytest.mark.parametrize("size", [10, 2000])
def test_tables_of_any_size(size, counted):
    model = Chain().eval()
    model.table = dict.fromkeys(range(size), 1.0)
    model.order = {"a": 1.0, "b": 2.0}
    model.odd = Property.__new__(Property)

    def forward(self, sample, timestep):
        self.table["last"] = sample * 2
        for name, value in self.order.items():
            sample = sample + value if name == "a" else sample * value
        return Chain.forward(self, sample * self.table[0] * self.odd.value[0], timestep)

    model.forward = MethodType(forward, model)
    fast = mc.optimize(model, full(model), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for change in (lambda: None, lambda: setattr(model, "order", {"b": 2.0, "a": 1.0})):
            change()
            x, t = inputs()
            assert torch.equal(fast(x, t), model(x, t))
            assert type(model.table["last"]) is torch.Tensor
        assert fast.report().recaptures == 1


@pytest.mark.filterwarnings("ignore:.*is set anew time and again")
def test_one_of_two_that_hold_the_same_gets_another():
    """A forward that fills a table changes nothing about what is looked at after it."""
    model = Chain().eval()
    model.table, one, other = {}, Plain(1.0), Plain(3.0)
    model.first, model.second, model.third = one, one, other

    def forward(self, sample, timestep):
        self.table.setdefault(tuple(sample.shape), (torch.ones(4), torch.ones(4)))
        return Chain.forward(self, sample, timestep) * self.second.value + self.third.value

    model.forward = MethodType(forward, model)
    fast = mc.optimize(model, full(model), backend="eager")
    for change in ({}, {"second": other}, {"second": one}, {"third": one}):
        for name, value in change.items():
            setattr(model, name, value)
        x, t = inputs()
        assert torch.equal(fast(x, t), model(x, t))
    assert fast.report().recaptures == 3


class Resolved(Chain):
    """Notes the shape that it was last called with, and all that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.seen = None, {}

    def forward(self, sample, timestep):
        self.last = tuple(sample.shape)
        self.seen.setdefault(self.last, len(self.seen))
        return super().forward(sample, timestep)


def test_what_another_capture_left_changes_nothing(counted):
    model = Resolved().eval()
    fast = mc.optimize(model, full(model), backend="eager", dynamic=False)
    for batch in (2, 3, 2, 5, 3, 2):
        mc.trace(model, *inputs(batch))
        x, t = inputs(batch)
        assert torch.equal(fast(x, t), model(x, t))
    assert fast.report().recaptures == 0
    assert len(counted) == 3


class Fusing(Chain):
    """Makes one of its weights anew, and lets go of a module, at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.init = nn.Parameter(torch.ones(4), requires_grad=False), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        if hasattr(self, "init"):
            self.weight = nn.Parameter(self.weight * 2, requires_grad=False)
            del self.init
        return super().forward(sample * self.weight, timestep)


@pytest.mark.filterwarnings("ignore:.*is set anew time and again")
def test_weights_that_the_first_call_makes_may_be_replaced():
    model = Fusing().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    for weight in (None, 5.0, 7.0):
        if weight is not None:
            model.weight = nn.Parameter(torch.full((4,), weight), requires_grad=False)
        x, t = inputs()
        assert torch.equal(fast(x, t), model(x, t))
    assert fast.report().recaptures == 2


class Asking:
    """Whatever is asked of it, it looks up, and raises what it likes."""

    def __init__(self, **found) -> None:
        self.__dict__["found"] = found

    def __getattr__(self, name):
        return self.__dict__["found"][name]


def test_settings_that_look_up_whatever_they_are_asked():
    model = Processed().eval()
    model.processor = Asking(scale=2.0)
    fast = mc.optimize(model, full(model), backend="eager")
    for scale in (2.0, 3.0):
        model.processor.found["scale"] = scale
        x, t = inputs()
        assert torch.equal(fast(x, t), model(x, t))
    assert fast.report().recaptures == 1


def test_a_scheduler_that_a_processor_refers_to_is_not_the_denoisers(counted):
    model = Processed().eval()
    model.processor.scheduler = diffusers.DDIMScheduler()
    fast = mc.optimize(model, full(model), backend="eager")
    for steps in (5, 10, 20):
        model.processor.scheduler.set_timesteps(steps)
        fast(*inputs())
    assert len(counted) == 1


def test_a_setting_that_is_another_time_and_again_is_named_once():
    model = Processed().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scale in range(5):
            model.processor.scale = float(scale)
            fast(*inputs())
    (said,) = [warning for warning in caught if "is set anew time and again" in str(warning.message)]
    assert str(said.message).startswith("Processed was captured 3 times, because processor.scale is set anew")
    assert said.filename == __file__


def test_slots_that_hold_their_denoiser_do_not_keep_it_alive():
    model = Chain().eval()
    model.a.holder = Slotted(1.0)
    model.a.holder.owner = model
    mc.optimize(model, full(model), backend="eager")(*inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:.*is set anew time and again")
@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("kind", BOXES)
def test_a_table_is_taken_as_it_is_until_it_is_made_anew(kind, within, counted):
    model = Tabulating(kind, within).eval()
    fast = mc.optimize(model, full(model), backend="eager")
    for _ in range(2):
        x, t = inputs()
        assert torch.equal(fast(x, t), model(x, t))  # which counts
    assert fast.report().recaptures == 0
    model.write(None)
    x, t = inputs()
    fast(x, t)
    assert fast.report().recaptures == 1
    model.write(torch.zeros(4))
    assert torch.equal(fast(x, t), model(x, t))
    assert len(counted) == 3


# ---- moved, failed, meanwhile -----------------------------------------------------------------------------------------------


class Buffered(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, sample, timestep):
        return super().forward(sample * self.table, timestep)


@pytest.mark.parametrize("move", [lambda m: m._apply(torch.clone), lambda m: m.to(torch.float64).to(torch.float32)])
def test_buffers_that_are_moved_away_and_back_are_the_same(move, counted):
    model = Buffered().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    fast(*inputs())
    move(fast)
    x, t = inputs()
    assert torch.equal(fast(x, t), model(x, t))
    fast.table.mul_(2)
    assert torch.equal(fast(x, t), model(x, t))
    assert fast.report().recaptures == 0
    assert len(counted) == 1


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_lack_of_memory_says_nothing_about_the_denoiser(error, monkeypatch):
    model = Chain().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", lambda *args, **kwargs: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            fast(*inputs())
    x, t = inputs()
    assert torch.equal(fast(x, t), model(x, t))
    assert not fast.report().uncaptured


def test_calls_of_other_threads_are_not_marked():
    model, others = Chain().eval(), []
    x, t = inputs()
    with _marking(model, {"a", "b", "c"}) as trail:
        thread = threading.Thread(target=lambda: others.append(model(x, t)))
        thread.start(), thread.join()
        assert not trail.calls
        model(x, t)
        assert [call.block for call in trail.calls] == ["a", "b", "c"]
    assert torch.equal(others[0], model(x, t))


@pytest.mark.parametrize("asked", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_what_graphs_of_torchs_own_return_is_copied(asked, monkeypatch):
    """On a CPU nothing is recorded: what stands for it overwrites what an earlier call of any graph returned."""
    returned = []

    @functools.wraps(torch.compile)
    def recorded(graph_module, **options):
        def run(*arguments):
            outputs = graph_module(*arguments)
            for tensor in returned:
                tensor.fill_(float("nan"))
            returned[:] = outputs
            return outputs

        return run

    monkeypatch.setattr(compiling.torch, "compile", recorded)
    model = Chain().eval()
    rows = [[True, True, True], [False, False, True], [False, False, True]]
    mask = mc.Mask(rows, blocks=["a", "b", "c"], timesteps=[900, 500, 100])
    alike = mc.optimize(model, mask, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = mc.optimize(model, mask, cuda_graphs=False, **asked)
    for timestep in (900, 500, 100):
        x, t = torch.randn(2, 4), torch.tensor(timestep)
        assert torch.equal(fast(x, t), alike(x, t))
    assert len(returned) == 1


def test_only_so_many_are_kept(counted):
    model = Chain().eval()
    for batch in range(2, 3 + captures.MOST_KEPT):
        mc.trace(model, *inputs(batch))
        mc.trace(model, *inputs(2))  # used all the time
    assert len(counted) == captures.MOST_KEPT + 1
    mc.trace(model, *inputs(3))
    assert len(counted) == captures.MOST_KEPT + 2


def test_an_optimised_denoiser_is_not_captured():
    model = Chain().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    program = mc.trace(model, *inputs())
    with pytest.raises(ValueError, match=r"already optimised; pass fast.original"):
        mc.trace(fast, *inputs())
    with pytest.raises(ValueError, match=r"already optimised; pass fast.original"):
        mc.schedules.measure_changes(fast, lambda seed: fast(*inputs()), program)
