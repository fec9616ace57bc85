"""What of a denoiser is looked at and put back: wherever settings lie, and whatever its forward keeps."""

from __future__ import annotations

import copy
import enum
import threading
import weakref
from collections import deque
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import maskcompile as mc
from tests.toys import Chain, Processed

STEPS = (900, 700, 500, 300)


def inputs(batch=2, timestep=900):
    return torch.randn(batch, 4), torch.tensor(timestep)


def optimised(model, **options):
    return mc.optimize(model, mc.Mask.full(["a", "b"], list(STEPS)), backend="eager", **options)


def follows(fast, model):
    """Whether the next run is what the denoiser does now."""
    fast.reset()  # settings are looked at when a run starts
    x, t = inputs()
    return torch.equal(fast(x, t), model(x, t))


# ---- settings ---------------------------------------------------------------------------------------------------------------


class Editor:
    def __init__(self):
        self.strength = 1.0

    def hook(self, module, args, output):
        return output * self.strength


def bound(module, editor):
    module.register_forward_hook(editor.hook)


def closed_over(module, editor):
    module.register_forward_hook(lambda module, args, output: output * editor.strength)


def filled_in(module, editor):
    def called(editor, module, args, output):
        return output * editor.strength

    module.register_forward_hook(partial(called, editor))


def by_default(module, editor):
    settings = vars(editor)

    def called(module, args, output, *, by=settings):
        return output * by["strength"]

    module.register_forward_hook(called)


@pytest.mark.parametrize("register", [bound, closed_over, filled_in, by_default])
def test_what_a_hook_goes_by_is_looked_at(register):
    model, editor = Chain().eval(), Editor()
    register(model.b, editor)
    fast = optimised(model)
    assert follows(fast, model)
    editor.strength = 3.0
    assert follows(fast, model)
    assert follows(fast, model)
    assert fast.report().recaptures == 1


class Storing:
    """A processor that keeps a map, in an attribute that its first call makes."""

    def __init__(self):
        self.scale, self.notes = 1.0, {"gain": 1.0}

    def __call__(self, x):
        self.map, self.notes["shape"] = x * 1.0, x.shape
        return x * self.scale * self.notes["gain"]


class Negating:
    def __call__(self, x):
        return -x


class Calling(Chain):
    def __init__(self, processor):
        super().__init__()
        self.processor = processor

    def forward(self, sample, timestep):
        return self.processor(super().forward(sample, timestep))


def test_what_a_first_call_adds_hides_nothing_else():
    model = Calling(Storing()).eval()
    fast = optimised(model)
    assert follows(fast, model)
    changes = [
        lambda: setattr(model.processor, "scale", 3.0),
        lambda: model.processor.notes.update(gain=2.0),
        lambda: setattr(model, "processor", Negating()),
    ]
    for done, change in enumerate(changes, 1):
        change()
        assert follows(fast, model)
        assert fast.report().recaptures == done
    assert follows(fast, model)
    assert fast.report().recaptures == len(changes)


class Tables(Chain):
    def __init__(self):
        super().__init__()
        self.tables = {}

    def forward(self, sample, timestep):
        table = self.tables.setdefault(len(sample), torch.arange(4.0))
        return super().forward(sample + table, timestep)


def test_tables_of_other_shapes_change_nothing_and_another_table_does():
    model = Tables().eval()
    fast = optimised(model, dynamic=False)
    assert follows(fast, model)
    model(*inputs(3))
    assert follows(fast, model)
    assert not fast.report().recaptures
    model.tables[2] = torch.ones(4)
    assert follows(fast, model)
    assert fast.report().recaptures == 1


class Default:
    """Sets its own scale where it has none."""

    scale = None

    def __call__(self, x):
        self.scale = 1.0 if self.scale is None else self.scale
        return x * self.scale


class Fixed:
    scale = 2.0

    def __call__(self, x):
        return x * self.scale


def test_what_one_processor_does_by_itself_is_looked_at_in_another():
    model = Calling(Default()).eval()
    fast = optimised(model)
    assert follows(fast, model)
    model.processor = Fixed()
    assert follows(fast, model)
    model.processor.scale = 5.0
    assert follows(fast, model)


def test_settings_of_a_config_may_be_set_as_attributes():
    """As loaders of diffusers do; its config is a dict that has them twice."""
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    fast = mc.optimize(model, mc.Mask.full(["mid_block.resnets.0"], list(STEPS)), backend="eager")
    x, t = torch.randn(1, 3, 8, 8), torch.tensor(900)
    before = fast(x, t).sample
    model.config.center_input_sample = True
    fast.reset()
    after = fast(x, t).sample
    assert torch.equal(after, model(x, t).sample)
    assert not torch.equal(after, before)


class Part(enum.Enum):
    SELF = 1
    CROSS = 2


class Keyed(Chain):
    def __init__(self):
        super().__init__()
        self.scales = {Part.SELF: 3.0}

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) * self.scales.get(Part.SELF, 1.0)


def test_keys_that_are_no_plain_values_count():
    model = Keyed().eval()
    fast = optimised(model)
    assert follows(fast, model)
    model.scales = {Part.CROSS: 3.0}
    assert follows(fast, model)
    assert fast.report().recaptures == 1


def test_a_module_in_two_places_is_replaced_in_one():
    model = Chain().eval()
    model.c = model.a
    fast = optimised(model)
    assert follows(fast, model)
    model.c = model.b
    assert follows(fast, model)


class Windowed:
    def __init__(self):
        self.table, self.window = np.ones(2000), slice(0, 2)

    def __call__(self, x):
        x = x * float(self.table[0])
        return x * x[:, self.window].sum(1, keepdim=True)


def slide(windowed):
    windowed.window = slice(1, 3)
    windowed.window = slice(2, 4)  # where the first one was


@pytest.mark.parametrize("change", [slide, lambda windowed: windowed.table.fill(3.0)])
def test_arrays_and_slices_count_by_value(change):
    model = Calling(Windowed()).eval()
    fast = optimised(model)
    assert follows(fast, model)
    change(model.processor)
    assert follows(fast, model)
    assert fast.report().recaptures == 1


class Pipeline:
    pass


def test_what_a_dead_proxy_stands_for_is_not_asked():
    model, pipeline = Processed().eval(), Pipeline()
    model.processor.pipeline = weakref.proxy(pipeline)
    del pipeline
    assert follows(optimised(model), model)


def test_a_compiled_processor_is_captured_once():
    """What torch.compile closes over changes as it compiles."""
    model = Calling(Fixed()).eval()
    model.processor = torch.compile(lambda x: x * 2.0, backend="eager")
    fast = optimised(model, dynamic=False)
    for batch in (2, 3, 2, 5, 2):
        x, t = inputs(batch)
        fast.reset()
        assert torch.equal(fast(x, t), model(x, t))
    assert not fast.report().recaptures
    assert not fast.report().uncaptured


# ---- what a forward keeps ---------------------------------------------------------------------------------------------------


class Filling(Chain):
    """Fills a buffer in place at its first call, and notes that it has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(4))
        self.filled, self.refused = False, False

    def forward(self, sample, timestep):
        if not self.filled:
            self.table.copy_(torch.arange(4.0) + 1)
            self.filled = True
        if self.refused and sample.sum() > 0:
            sample = sample * 2
        return super().forward(sample * self.table, timestep)


@pytest.mark.parametrize("refused", [False, True])
def test_a_buffer_and_the_note_that_it_is_filled_stay_together(refused):
    model = Filling().eval()
    model.refused = refused
    reference = copy.deepcopy(model)
    if refused:
        with pytest.raises(mc.CaptureError):
            mc.trace(model, *inputs())
        assert not model.filled
        assert not model.table.any()
    fast = optimised(model)
    x, t = inputs()
    assert torch.equal(fast(x, t), reference(x, t))
    assert torch.equal(model(x, t), reference(x, t))
    assert bool(fast.report().uncaptured) is refused


class EveryThird(Chain):
    """A step cache of its own."""

    def __init__(self):
        super().__init__()
        self.state = {"n": 0, "kept": None}

    def forward(self, sample, timestep):
        state = self.state
        if state["n"] % 3 == 0:
            state["kept"] = super().forward(sample, timestep)
        state["n"] += 1
        return sample + state["kept"]


def every_third(forward, state):
    def run(*args):
        if state["n"] % 3 == 0:
            state["kept"] = forward(*args)
        state["n"] += 1
        return state["kept"]

    return run


def in_a_closure():
    model = Chain()
    model.b.forward = every_third(model.b.forward, {"n": 0, "kept": None})
    return model


@pytest.mark.parametrize("make", [EveryThird, in_a_closure])
@pytest.mark.parametrize("first", [torch.randn, torch.zeros])
def test_a_refused_capture_is_no_call(make, first):
    """It goes on with the counters and caches that it had."""
    torch.manual_seed(0)
    model = make().eval()
    torch.manual_seed(0)
    reference = make().eval()
    reference.load_state_dict(model.state_dict())
    with pytest.raises(mc.CaptureError, match="depends on state"):
        mc.trace(model, first(2, 4), torch.tensor(900))
    fast = optimised(model)
    for timestep in STEPS * 2:
        x, t = inputs(timestep=timestep)
        assert torch.equal(fast(x, t), reference(x, t))
    assert fast.report().uncaptured
    assert not fast.report().recaptures


class Labelled(Chain):
    """Keeps what it made of the labels of its first call."""

    def __init__(self):
        super().__init__()
        self.embed, self.cache = nn.Embedding(10, 4), {}

    def forward(self, sample, timestep, labels):
        if "kept" not in self.cache:
            self.cache["kept"] = self.embed(labels)
        return super().forward(sample + self.cache["kept"], timestep)


@pytest.mark.parametrize("labels", [[1, 2], [4, 4]])
def test_a_denoiser_that_keeps_its_labels_is_not_captured(labels):
    with pytest.raises(mc.CaptureError, match="depends on state"):
        mc.trace(Labelled().eval(), *inputs(), torch.tensor(labels))


class Gate:
    """On at some steps of a run, which it counts."""

    def __init__(self, on):
        self.step, self.on = 0, on

    def __call__(self, x):
        on = self.on(self.step)
        self.step += 1
        return 3 * x if on else x


class ClassGate(Gate):
    """Counts from what its class has."""

    step = 0

    def __init__(self, on):
        self.on = on


class LazyGate(Gate):
    def __init__(self, on):
        self.on = on

    def __call__(self, x):
        self.step = getattr(self, "step", 0)
        return super().__call__(x)


class Extrapolating:
    """A step cache that goes by the last two calls once it has them."""

    def __init__(self, on):
        self.history = deque(maxlen=2)

    def __call__(self, x):
        self.history.append(x)
        return 2 * self.history[1] - self.history[0] if len(self.history) == 2 else x


def within(low, high):
    return lambda n: low <= n < high


GATES = [within(0, 2), within(0, 40), within(4, 50), within(5, 10), within(10, 40), lambda n: n % 2, lambda n: n % 3 == 2]
GATES += [[1, 0, 0, 1, 0, 1, 1, 0].__getitem__]


@pytest.mark.parametrize("on", GATES)
@pytest.mark.parametrize("kind", [Gate, ClassGate, LazyGate])
def test_a_processor_that_counts_steps_is_not_captured(kind, on):
    """As those of prompt-to-prompt and MasaCtrl do."""
    follows_its_state(kind, on)


def test_a_processor_that_extrapolates_is_not_captured():
    follows_its_state(Extrapolating, None)


def follows_its_state(kind, on):
    model, reference = Calling(kind(on)).eval(), Calling(kind(on)).eval()
    reference.load_state_dict(model.state_dict())
    fast = optimised(model)
    with pytest.warns(UserWarning, match="skipped module by module"):
        fast.warmup(*inputs())
    model.processor = kind(on)
    for timestep in STEPS * 2:
        x, t = inputs(timestep=timestep)
        assert torch.equal(fast(x, t), reference(x, t))


class Preallocated:
    """Keeps what it sees in a list with room for so many steps."""

    def __init__(self):
        self.step, self.maps = 0, [None] * 50

    def __call__(self, x):
        self.maps[self.step] = x * 1.0
        self.step += 1
        return x


def test_a_count_that_an_error_ends_is_no_state():
    model = Calling(Preallocated()).eval()
    fast = optimised(model)
    x, t = inputs()
    assert torch.equal(fast(x, t), model(x, t))
    assert not fast.report().uncaptured


def test_a_count_that_decides_nothing_is_no_state():
    model = Calling(Gate(lambda n: True)).eval()
    fast = optimised(model)
    assert follows(fast, model)
    assert not fast.report().uncaptured


def collecting(found):
    return lambda module, args, output: found.__setitem__("b", output)


def appending(found):
    return lambda module, args, output: found.setdefault("all", []).append(output)


@pytest.mark.parametrize("keep", [collecting, appending])
def test_features_that_a_hook_collects_are_real(keep):
    model, found = Chain().eval(), {}
    model.b.register_forward_hook(keep(found))
    optimised(model)(*inputs())
    leaves = torch.utils._pytree.tree_leaves(found)
    assert leaves
    assert not any(isinstance(leaf, FakeTensor) for leaf in leaves)


def test_threads_that_trace_one_denoiser_wait_for_each_other():
    tracing, begun = threading.Event(), threading.Event()

    class Slow(Chain):
        def forward(self, sample, timestep):
            if isinstance(sample, FakeTensor) and not tracing.is_set():
                tracing.set()
                begun.wait(timeout=60)
                second.join(timeout=2)  # it waits for this one
            return super().forward(sample, timestep)

    model = Slow().eval()
    first = threading.Thread(target=lambda: mc.trace(model, *inputs(2)))
    second = threading.Thread(target=lambda: mc.trace(model, *inputs(3)))
    first.start()
    assert tracing.wait(timeout=300)
    second.start()
    begun.set()
    first.join()
    second.join()
    fast = optimised(model, dynamic=False)
    fast(*inputs(3))
    model.b.register_forward_hook(lambda module, args, output: 3 * output)
    x, t = inputs(3)
    fast.reset()
    assert torch.equal(fast(x, t), model(x, t))


class Scaling:
    """Its method stands where a denoiser's forward was."""

    def __init__(self, forward):
        self.forward, self.scale = forward, 1.0

    def scaled(self, sample, timestep):
        return self.forward(sample, timestep) * self.scale


def test_what_a_method_in_the_place_of_forward_goes_by_is_looked_at():
    model = Chain().eval()
    scaling = Scaling(model.forward)
    model.forward = scaling.scaled
    fast = optimised(model)
    assert follows(fast, model)
    scaling.scale = 2.0
    assert follows(fast, model)
    assert fast.report().recaptures == 1


class Table(Chain):
    def __init__(self):
        super().__init__()
        self.table, self.calls = None, 0

    def forward(self, sample, timestep):
        self.calls += 1
        if self.table is None:
            self.table = torch.arange(4.0, device=sample.device)
        return super().forward(sample + self.table, timestep)


def test_a_denoiser_on_the_meta_device_may_fill_a_table():
    model = Table().eval().to("meta")
    program = mc.trace(model, torch.randn(2, 4, device="meta"), torch.tensor(900, device="meta"))
    assert program.names == mc.trace(Table().eval(), *inputs()).names


class Letting(Chain):
    """Lets go of a module at its first call, and has another without weights."""

    def __init__(self):
        super().__init__()
        self.init, self.act = nn.Linear(4, 4), nn.SiLU()

    def forward(self, sample, timestep):
        if "init" in self._modules:
            del self.init
        return self.act(super().forward(sample, timestep))


def test_a_module_that_goes_hides_no_other():
    model = Letting().eval()
    fast = optimised(model)
    assert follows(fast, model)
    model.act = nn.ReLU()
    assert follows(fast, model)
    assert fast.report().recaptures == 1


class Classwide:
    """Its scale is the class's until it is set."""

    scale = 1.0

    def __call__(self, x):
        self.map = x.shape
        return x * self.scale


def test_a_setting_that_the_class_had_is_looked_at():
    model = Calling(Classwide()).eval()
    fast = optimised(model)
    assert follows(fast, model)
    model.processor.scale = 3.0
    assert follows(fast, model)
    assert fast.report().recaptures == 1


def test_what_grows_is_known_after_another_setting_changed():
    model = Tables().eval()
    model.gain = 1.0
    fast = optimised(model, dynamic=False)
    assert follows(fast, model)
    model.gain = 2.0
    assert follows(fast, model)
    assert fast.report().recaptures == 1
    for batch in (3, 5):
        model(*inputs(batch))
        assert follows(fast, model)
    assert fast.report().recaptures == 1


class Folding(Chain):
    """Folds a scale into a weight, or into a tensor that it keeps, at its first call."""

    def __init__(self, what, refused):
        super().__init__()
        self.folded, self.table = False, torch.ones(4)
        self.fold = {"weight": lambda: self.a.up.weight, "tensor": lambda: self.table}[what]
        self.refused = refused

    def forward(self, sample, timestep):
        if not self.folded:
            self.fold().mul_(2)
            self.folded = True
        if self.refused and sample.sum() > 0:
            sample = sample * 2
        return super().forward(sample * self.table, timestep)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("what", ["weight", "tensor"])
def test_what_a_first_call_folds_is_folded_once(what, refused):
    model, reference = Folding(what, refused).eval(), Folding(what, refused).eval()
    reference.load_state_dict(model.state_dict())
    fast = optimised(model)
    with torch.no_grad():
        for timestep in STEPS:
            x, t = inputs(timestep=timestep)
            assert torch.equal(fast(x, t), reference(x, t))
        assert torch.equal(model(x, t), reference(x, t))
    assert bool(fast.report().uncaptured) is refused


class Multiplying(Chain):
    """Multiplies a setting for the time of a call, as PEFT's ``cross_attention_kwargs={"scale": ...}`` does."""

    def __init__(self):
        super().__init__()
        self.scaling = {"a": 0.1}

    def forward(self, sample, timestep):
        self.scaling["a"] *= 0.1
        result = super().forward(sample, timestep) * self.scaling["a"]
        self.scaling["a"] /= 0.1
        return result


def test_a_setting_that_is_multiplied_and_divided_again_may_be_set():
    model = Multiplying().eval()
    fast = optimised(model)
    x, t = inputs()
    fast(x, t)
    assert model.scaling["a"] != 0.1
    fast.reset()
    fast(x, t)
    assert not fast.report().recaptures
    model.scaling["a"] = 5.0
    fast.reset()
    torch.testing.assert_close(fast(x, t), model(x, t))
    assert fast.report().recaptures == 1


FEATURES = {}


def into_a_global(module, args, output):
    FEATURES["b"] = output


class Extractor(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = {}

    def hook(self, module, args, output):
        self.features["b"] = output


def test_features_in_globals_and_modules_are_real():
    model, extractor = Chain().eval(), Extractor()
    model.b.register_forward_hook(into_a_global)
    model.b.register_forward_hook(extractor.hook)
    optimised(model)(*inputs())
    for features in (FEATURES, extractor.features):
        assert type(features.pop("b")) is torch.Tensor


class Application:
    """What a hook is bound to may be anything, and do anything meanwhile."""

    def __init__(self):
        self.gain, self.pictures = 1.0, 0

    def hook(self, module, args, output):
        return self.scaled(output)

    def scaled(self, output):
        return output * self.gain


def test_of_what_a_hook_is_bound_to_what_it_names_counts():
    model, application = Chain().eval(), Application()
    model.b.register_forward_hook(application.hook)
    fast = optimised(model)
    for _ in range(3):
        application.pictures += 1
        assert follows(fast, model)
    assert not fast.report().recaptures
    application.gain = 3.0
    assert follows(fast, model)
    assert fast.report().recaptures == 1


@pytest.mark.parametrize("wrap", [torch.compiler.disable, lambda hook: torch.compile(hook, backend="eager"), torch.no_grad()])
def test_what_torch_wraps_is_looked_into(wrap):
    model, editor = Chain().eval(), Editor()
    model.b.register_forward_hook(wrap(lambda module, args, output: output * editor.strength))
    fast = optimised(model)
    assert follows(fast, model)
    editor.strength = 3.0
    assert follows(fast, model)


class Late(Chain):
    """Refused, and changes an attribute at its third call first."""

    def __init__(self):
        super().__init__()
        self.calls, self.saved = 0, None

    def forward(self, sample, timestep):
        self.calls += 1
        if self.calls == 3:
            self.saved = sample
        return super().forward(sample, timestep) * (2.0 if self.calls % 2 else 1.0)


def test_what_a_refused_denoiser_changes_later_in_a_run_is_its_own(counted):
    model = Late().eval()
    fast = optimised(model)
    for _ in range(3):
        model.calls = 0
        for timestep in STEPS:
            fast(*inputs(timestep=timestep))
    assert fast.report().uncaptured
    assert not fast.report().recaptures
    assert len(counted) == 1
