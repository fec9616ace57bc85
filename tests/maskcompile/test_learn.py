"""Learning masks: budgets, what the learned masks are worth against the executor, resuming, several processes, bad input."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import maskcompile as mc
from maskcompile.learning.fidelity import Fidelity, fidelity
from maskcompile.learning.processes import Processes
from maskcompile.learning.recording import record
from maskcompile.learning.relaxed import RelaxedDenoiser
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor
from tests.toys import Block, Chain

STEPS = 8
ROOT = Path(__file__).parents[2]
QUICK = mc.Paper(epochs=3, updates=2)


def sampler(case, calls=None, steps=STEPS):
    """sample(seed): a DDIM loop of the case's denoiser, which returns the final sample."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)

    def sample(seed, model=None):
        model = case.model if model is None else model
        args, _ = case.inputs(case.batch, 999, seed)
        x = args[0]
        with torch.no_grad():
            for t in scheduler.timesteps:
                _, given = case.inputs(case.batch, int(t), seed)
                rest = [torch.as_tensor(t)] if len(args) > 1 else []
                x = scheduler.step(tensors_of(model(x, *rest, **given))[0][:, : x.shape[1]], t, x).prev_sample
                if calls is not None:
                    calls.append(int(t))
        return x

    return sample


def executed(case, mask, seed, **options):
    """What ``sample`` comes to when the forward-hook executor runs the mask."""
    executor = Executor(case.model, mask.blocks, mask.compute.tolist(), log_snr=mask.log_snr, reach=mask.reach, **options)
    step = iter(range(mask.steps))
    return sampler(case)(seed, lambda *args, **kwargs: executor.step(next(step), *args, **kwargs))


def share(case, mask):
    args, kwargs = case.inputs(case.batch, 999, 0)
    return mc.cost(mc.trace(case.model, *args, **kwargs), mask).share


@pytest.fixture(scope="module")
def case():
    return denoiser("unet2d")


METHODS = {"search": mc.Search(passes=8), "random": QUICK, "gumbel": mc.Paper(relaxation="gumbel", epochs=3, updates=2)}


@pytest.mark.parametrize(
    ("name", "method", "budget"),
    [
        ("unet2d", "search", 0.4),
        ("unet2d", "random", 0.63),
        ("unet2d", "gumbel", 0.4),
        ("dit", "search", 0.63),
        ("dit", "random", 0.4),
    ],
)
def test_it_meets_the_budget(name, method, budget):
    case = denoiser(name)
    sample = sampler(case, steps=40 if name == "dit" else 20)  # few blocks, and large ones
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mask = mc.learn(case.model, sample, budget, method=METHODS[method], progress=False)
    assert budget - 0.01 <= share(case, mask) <= budget + 0.01
    assert mask.provenance["budget"] == budget
    assert mask.provenance["share"] == pytest.approx(share(case, mask), abs=1e-4)


def test_it_says_where_it_cannot_meet_the_budget():
    case = denoiser("dit")
    with pytest.warns(UserWarning, match=r"keeps 0\.\d+ of the MACs, and the budget is 0\.6: no block is small enough"):
        mc.learn(case.model, sampler(case, steps=3), 0.6, method=QUICK, progress=False)


def test_the_search_says_how_faithful_its_mask_is(case):
    mask = mc.learn(case.model, sampler(case), 0.5, method=METHODS["search"], seeds=(3, 4), reuse="hold", progress=False)
    decibels = []
    for seed in (3, 4):
        ours, theirs = executed(case, mask, seed), sampler(case)(seed)
        error = (ours - theirs).square().flatten(1).mean(1)
        decibels += (10 * torch.log10(theirs.flatten(1).var(1, unbiased=False) / error)).tolist()
    assert mask.provenance["fidelity_db"] == pytest.approx(np.mean(decibels), abs=0.01)


def test_the_search_beats_the_schedules_that_it_knows(case):
    sample = sampler(case)
    args, kwargs = case.inputs(case.batch, 999, 0)
    program = mc.trace(case.model, *args, **kwargs)
    mask = mc.learn(case.model, sample, 0.6, method=mc.Search(passes=25), reuse="hold", progress=False)
    uniform = mc.schedules.uniform(program, mask.timesteps, interval=2)
    assert mc.cost(program, uniform).share <= 0.6

    def held_out(m):
        return np.mean([fidelity(executed(case, m, s).flatten(1), sample(s).flatten(1)).mean() for s in (70, 71, 72)])

    assert held_out(mask) > held_out(uniform)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_search_in_half_precision(dtype):
    torch.manual_seed(0)
    model = Chain().eval().to(dtype)

    def sample(seed, model=model):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for t in range(1600, 0, -100):
            x = x - 0.1 * model(x, torch.tensor(float(t))).detach()
        return x

    weights = copy.deepcopy(model.state_dict())
    mask = mc.learn(model, sample, 0.5, method=mc.Search(passes=20, reach=False), reuse="hold", progress=False)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    def held_out(compute):
        executor = Executor(model, mask.blocks, compute.tolist())
        found = []
        for seed in (70, 71, 72):
            executor.reset()
            step = iter(range(mask.steps))
            other = sample(seed, lambda x, t, step=step: executor.step(next(step), x, t))
            found.append(fidelity(other.flatten(1), sample(seed).flatten(1)).mean())
        return np.mean(found)

    every_second = np.zeros_like(mask.compute)
    every_second[::2] = True
    program = mc.trace(model, torch.zeros(4, 4, dtype=dtype), torch.tensor(1.0))
    assert mc.cost(program, mask).share <= mc.cost(program, mask.replace(every_second)).share + 0.01
    assert held_out(mask.compute) > held_out(every_second)


class Branches(nn.Module):
    """Two blocks of equal cost side by side, of which one hardly matters."""

    def __init__(self):
        super().__init__()
        self.much, self.little = Block(4), Block(4)

    def forward(self, sample, timestep):
        time = timestep.reshape(-1, 1) / 1000
        return self.much(sample, time) + 1e-3 * self.little(sample, time)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relaxation", ["random", "gumbel"])
def test_blocks_that_matter_get_high_scores(relaxation, dtype):
    torch.manual_seed(0)
    model = Branches().eval().to(dtype)

    def sample(seed):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for t in range(900, 100, -100):
            x = x - 0.2 * model(x, torch.tensor(float(t), dtype=dtype)).detach()
        return x

    mask = mc.learn(model, sample, 0.57, method=mc.Paper(relaxation=relaxation), progress=False)
    assert mask.blocks == ("much", "little")
    assert mask.compute[1:].sum(0).tolist() == [7, 1] or mask.compute[1:].sum(0).tolist() == [7, 0]


def test_scores_converge(case):
    mask = mc.learn(case.model, sampler(case), 0.5, method="paper", progress=False)
    assert sum(mask.provenance["score_histogram"]) == (STEPS - 1) * len(mask.blocks)
    assert mask.provenance["scores_near_0_or_1"] > 0.5


@pytest.mark.parametrize("during", ["search", "fit", "paper"])
def test_interrupted_it_comes_to_the_same_mask(case, tmp_path, during):
    method = QUICK if during == "paper" else mc.Search(passes=10)
    reuse = "hold" if during == "paper" else "linear"
    whole = mc.learn(case.model, sampler(case), 0.5, method=method, reuse=reuse, progress=False)
    assert (whole.reach is None) == (during == "paper")
    calls: list[int] = []
    sample, path = sampler(case, calls), tmp_path / "learning.json"
    forwards = []

    class Killed(BaseException):
        pass

    def failing(seed):
        forwards.append(seed)
        if (len(forwards) > 5) if during == "search" else path.exists() and '"reach ' in path.read_text():
            raise Killed
        return sample(seed)

    if isinstance(method, mc.Search):
        with pytest.raises(Killed):
            mc.learn(case.model, failing, 0.5, method=method, reuse=reuse, checkpoint=path, progress=False)
    else:
        document = path  # the paper's method goes on from its last epoch
        mc.learn(case.model, sample, 0.5, method=method, reuse=reuse, checkpoint=document, progress=False)
        saved = json.loads(document.read_text())
        del saved["results"]["epoch 2"]
        document.write_text(json.dumps(saved))
    assert "forward" not in vars(case.model)
    saved = json.loads(path.read_text())["results"]
    assert saved
    calls.clear()
    again = mc.learn(case.model, sample, 0.5, method=method, reuse=reuse, checkpoint=path, progress=False)
    assert again == whole
    assert again.provenance == whole.provenance
    finished = len(calls)
    calls.clear()
    assert mc.learn(case.model, sample, 0.5, method=method, reuse=reuse, checkpoint=path, progress=False) == whole
    assert len(calls) <= finished  # all that is left to run are the recordings
    assert len(calls) == 2 * STEPS


def test_a_checkpoint_of_another_sampler_is_refused(case, tmp_path):
    path, sample = tmp_path / "learning.json", sampler(case)
    mc.learn(case.model, sample, 0.5, method=QUICK, checkpoint=path, progress=False)
    for other in (lambda seed: sample(seed)[:1], lambda seed: sample(seed + 9)):
        with pytest.raises(ValueError, match="another sampler"):
            mc.learn(case.model, other, 0.5, method=QUICK, checkpoint=path, progress=False)


def test_a_checkpoint_of_other_settings_is_refused(case, tmp_path):
    path = tmp_path / "learning.json"
    mc.learn(case.model, sampler(case), 0.5, method=QUICK, checkpoint=path, progress=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another budget \(0.5, now 0.6\)"):
        mc.learn(case.model, sampler(case), 0.6, method=QUICK, checkpoint=path, progress=False)
    assert path.read_bytes() == before
    path.write_text("{")
    with pytest.raises(ValueError, match="no checkpoint"):
        mc.learn(case.model, sampler(case), 0.5, method=QUICK, checkpoint=path, progress=False)


SCRIPT = """
import os, sys, torch
import maskcompile as mc
from maskcompile.learning.memo import Memo
from tests.denoisers import denoiser
from tests.maskcompile.test_learn import sampler, QUICK
torch.set_num_threads(1)
case = denoiser("unet2d")
method, reuse = (mc.Search(passes=8), "linear") if sys.argv[1] == "search" else (QUICK, "hold")
options = {"checkpoint": sys.argv[3]} if len(sys.argv) > 3 else {}
writes, write = [], Memo.__setitem__
Memo.__setitem__ = lambda memo, key, value: (writes.append(key), write(memo, key, value))
mask = mc.learn(case.model, sampler(case), 0.5, method=method, reuse=reuse, seeds=(0, 1, 2), progress=False, **options)
mask.save(sys.argv[2] + os.environ.get("RANK", "") + ".json")
print(len(writes))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_script(launch, *arguments):
    done = subprocess.run([*launch, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "learn.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module", params=["search", "paper"])
def alone(request, script):
    """(a method, the mask that a process of its own learns by it)"""
    run_script([sys.executable], script, request.param, script.parent / request.param)
    mask = mc.Mask.load(script.parent / f"{request.param}.json")
    assert (mask.reach is None) == (request.param == "paper")
    return request.param, mask


def test_two_processes_learn_the_mask_of_one(alone, script, tmp_path):
    method, one = alone
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]
    run_script(launch, script, method, tmp_path / "two")
    for mask in (mc.Mask.load(tmp_path / f"two{rank}.json") for rank in range(2)):
        assert mask == one
        assert mask.provenance == one.provenance


def test_killed_it_comes_to_the_same_mask(alone, script, tmp_path):
    """By SIGKILL, which nothing can catch, once something has been saved; what was saved is not computed again."""
    method, one = alone
    checkpoint = tmp_path / "checkpoint.json"
    arguments = script, method, tmp_path / "killed", checkpoint
    learning = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not checkpoint.exists() or len(json.loads(checkpoint.read_text())["results"]) < 2:
            assert learning.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        learning.kill()
    assert learning.wait() == -signal.SIGKILL
    saved = json.loads(checkpoint.read_text())["results"]
    writes = int(run_script([sys.executable], *arguments))
    assert mc.Mask.load(tmp_path / "killed.json") == one
    results = json.loads(checkpoint.read_text())["results"]
    assert {key: results[key] for key in saved} == saved
    assert writes == len(results) - len(saved) > 0


def test_separate_guidance_and_two_calls_a_step(case):
    """Two calls at each timestep, as guidance without batching makes them."""

    def sample(seed):
        x = case.inputs(case.batch, 999, seed)[0][0]
        for t in range(900, 100, -100):
            with torch.no_grad():
                plain = tensors_of(case.model(x, torch.tensor(t)))[0]
                guided = tensors_of(case.model(x + 0.1, torch.tensor(t)))[0]
            x = x - 0.1 * (plain + 2 * (guided - plain))
        return x

    for method in (mc.Search(passes=6), QUICK):
        mask = mc.learn(case.model, sample, 0.5, method=method, progress=False)
        assert mask.steps == 8
        assert 0.49 <= mask.provenance["share"] <= 0.51


def test_a_pipeline(case):
    """A whole diffusers pipeline, whose output holds arrays."""
    pipe = diffusers.DDIMPipeline(case.model, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return pipe(batch_size=2, num_inference_steps=STEPS, generator=generator, output_type="np")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mask = mc.learn(pipe.unet, sample, 0.5, method=mc.Search(passes=6), progress=False)
    assert mask.steps == STEPS
    pipe.unet = mc.optimize(pipe.unet, mask, backend="eager")
    sample(5)
    report = pipe.unet.report()
    assert report.unknown_timesteps == 0
    assert report.reusing_calls > 0
    assert report.signatures[0].share == pytest.approx(mask.provenance["share"], abs=1e-4)


@pytest.mark.parametrize(
    ("returns", "named"),
    [("tensor", False), ("nothing", False), ("nothing", True), ("pictures", False), ("dictionary", False)],
)
def test_a_full_mask_changes_nothing(returns, named):
    """Whatever a sampler returns, though it changes its sample in place, and whatever the order of what it names."""
    case = denoiser("unet2d_condition" if named else "unet2d")
    text = torch.randn(case.batch, 5, 16, generator=torch.Generator().manual_seed(0))

    def sample(seed):
        x = case.inputs(case.batch, 999, seed)[0][0].clone()
        for t in range(900, 300, -100):
            with torch.no_grad():
                given = {"timestep": torch.tensor(t), "sample": x, "encoder_hidden_states": text} if named else {}
                x.sub_(tensors_of(case.model(**given) if named else case.model(x, torch.tensor(t)))[0], alpha=0.1)
        array = (x.clamp(-1, 1) * 127 + 128).permute(0, 2, 3, 1).byte().numpy()
        kinds = {"tensor": x, "nothing": None, "pictures": [Image.fromarray(a) for a in array], "dictionary": {"x": x, "n": 3}}
        return kinds[returns]

    recording = record(case.model, sample, 0)
    assert len(recording.outcome) == case.batch
    if returns == "nothing":
        last = recording.steps[-1][0]
        noisy = last.call.kwargs["sample"] if named else last.call.args[0]
        assert torch.equal(recording.outcome, torch.cat([noisy.flatten(1), last.results[0].flatten(1)], dim=1))
    full = mc.Mask.full(["mid_block.attentions.0"], recording.timesteps)
    measured = Fidelity(case.model, sample, [recording], full, "eager", None, Processes())
    assert measured(full).tolist() == [80.0] * case.batch
    off = measured(full.replace(np.arange(full.steps)[:, None] == 0))
    assert (off < 70).all()


@pytest.mark.parametrize("method", [mc.Search(passes=4), QUICK])
def test_under_inference_mode(case, method):
    plain = mc.learn(case.model, sampler(case), 0.5, method=method, progress=False)
    with torch.inference_mode():
        assert mc.learn(case.model, sampler(case), 0.5, method=method, progress=False) == plain


def test_the_papers_mask_keeps_to_its_rules(case):
    args, kwargs = case.inputs(case.batch, 999, 0)
    program = mc.trace(case.model, *args, **kwargs)
    mask = mc.learn(case.model, sampler(case, steps=40), 0.6, method=QUICK, progress=False)
    rules = mask.provenance["options"]["rectification"]
    assert mc.cost(program, mc.rectify(mask, program, rules)).share == mc.cost(program, mask).share


def test_the_model_is_left_as_it_was(case):
    parameters = list(case.model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    wanted = [p.requires_grad for p in parameters]
    values = [p.detach().clone() for p in parameters]
    try:
        for method in (mc.Search(passes=4), QUICK):
            mc.learn(case.model, sampler(case), 0.5, method=method, progress=False)
        assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
        assert all(p.grad is None for p in parameters[1:])
        assert [p.requires_grad for p in parameters] == wanted
        assert all(map(torch.equal, parameters, values))
        assert not case.model.training
        assert "forward" not in vars(case.model)
    finally:
        parameters[0].grad = None


def test_bad_input(case):
    sample = sampler(case)
    with pytest.raises(mc.MaskError, match=r"a budget of 0.05 is below 0\.\d+, the share of the MACs that always run"):
        mc.learn(case.model, sample, 0.05, progress=False)
    with pytest.raises(mc.MaskError, match=r"at most 1; got 1\.5"):
        mc.learn(case.model, sample, 1.5, progress=False)
    with pytest.raises(ValueError, match="never called the denoiser"):
        mc.learn(case.model, lambda seed: torch.zeros(3), 0.5, progress=False)
    with pytest.raises(ValueError, match=r"sample\(1\) called the denoiser 9 times at 9 timesteps, sample\(0\) 8 times at 8"):
        mc.learn(case.model, lambda seed: sampler(case, steps=STEPS + seed)(seed), 0.5, progress=False)
    with pytest.raises(ValueError, match="method is 'search' or 'paper'"):
        mc.learn(case.model, sample, 0.5, method="magic", progress=False)
    with pytest.raises(ValueError, match="relaxation is one of"):
        mc.Paper(relaxation="soft")
    fast = mc.optimize(case.model, mc.Mask.full(["mid_block.attentions.0"], [2, 1]), backend="eager")
    with pytest.raises(ValueError, match="already optimised"):
        mc.learn(fast, sample, 0.5, progress=False)
    case.model.train()
    try:
        with pytest.raises(ValueError, match="train mode"):
            mc.learn(case.model, sample, 0.5, progress=False)
        assert case.model.training
    finally:
        case.model.eval()
    with pytest.raises(ValueError, match="in one direction"):
        mc.learn(case.model, lambda seed: [sample(seed), sample(seed)], 0.5, progress=False)
    for passes in (0, -5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="passes is the work of the search in sampling passes, above 0; got"):
            mc.Search(passes=passes)
    for options in ({"learning_rate": float("nan")}, {"learning_rate": 0.0}, {"bimodal": -1.0}):
        with pytest.raises(ValueError, match="learning_rate is above 0 and bimodal 0 or more"):
            mc.Paper(**options)

    def cast(seed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sample(seed)

    for method in METHODS.values():
        with pytest.raises(ValueError, match="autocast is active"):
            mc.learn(case.model, cast, 0.5, method=method, progress=False)


def test_what_is_not_finite_stops_with_the_step_named(case):
    def sample(seed):
        x = case.inputs(case.batch, 999, seed)[0][0]
        for step, t in enumerate(range(900, 400, -100)):
            with torch.no_grad():
                x = tensors_of(case.model(x * (float("nan") if step == 3 else 1), torch.tensor(t)))[0]
        return x

    with pytest.raises(FloatingPointError, match=r"step 3 \(timestep 600\)"):
        mc.learn(case.model, sample, 0.5, progress=False)
    assert "forward" not in vars(case.model)
    with pytest.raises(FloatingPointError, match=r"what sample\(0\) returned is not finite"):
        mc.learn(case.model, lambda seed: sampler(case)(seed) * float("nan"), 0.5, progress=False)


@pytest.mark.parametrize("verb", ["learn", "fit_reach"])
@pytest.mark.parametrize("breaks", ["denoiser", "sampler"])
def test_masks_under_which_nothing_is_finite_stop_with_the_step_named(case, verb, breaks):
    """A sampler that breaks where a step is not what it is without a mask."""
    own = {seed: list(steps_of(case, seed)) for seed in (0, 1)}

    def sample(seed):
        for step, x in enumerate(steps_of(case, seed, own[seed] if breaks == "denoiser" else None)):
            last = step, x
        return last[1] if breaks == "denoiser" or torch.equal(last[1], own[seed][-1]) else last[1] * float("nan")

    at = r"the denoiser's output is not finite at step \d+ \(timestep \d+\) of sample\([01]\)"
    said = at if breaks == "denoiser" else r"what sample\([01]\) returned is not finite, although the denoiser's outputs are"
    mask = mc.schedules.uniform(program_of(case), range(900, 300, -100), interval=2, reuse="linear")
    verbs = {
        "learn": lambda: mc.learn(case.model, sample, 0.5, method=METHODS["search"], progress=False),
        "fit_reach": lambda: mc.fit_reach(case.model, mask, sample, progress=False),
    }
    with pytest.raises(FloatingPointError, match=rf"under the best mask that was tried, {said}"):
        verbs[verb]()
    assert "forward" not in vars(case.model)


def steps_of(case, seed, known=None):
    """The samples of a pass; not finite from where they differ from those that are known."""
    x = case.inputs(case.batch, 999, seed)[0][0]
    for step, t in enumerate(range(900, 300, -100)):
        with torch.no_grad():
            x = x - 0.1 * tensors_of(case.model(x, torch.tensor(t)))[0]
        if known is not None and not torch.equal(x, known[step]):
            x = x * float("nan")
        yield x


def test_a_budget_of_everything(case):
    assert mc.learn(case.model, sampler(case), 1.0, progress=False).compute.all()


def test_memory_does_not_grow_with_the_steps(case, monkeypatch):
    """How many bytes of block outputs the paper's method holds at a time."""
    held = {}
    for steps in (6, 24):
        alive, peak = [], 0
        observe, error = RelaxedDenoiser.observe, RelaxedDenoiser.error

        def watched(self, calls, observe=observe, alive=alive):
            features = observe(self, calls)
            alive += [(weakref.ref(t), t.nbytes) for found in features for t in found.values()]
            return features

        def counting(self, *args, error=error, alive=alive):
            nonlocal peak
            peak = max(peak, sum(size for tensor, size in alive if tensor() is not None))
            return error(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(RelaxedDenoiser, "observe", watched)
            patched.setattr(RelaxedDenoiser, "error", counting)
            mc.learn(case.model, sampler(case, steps=steps), 0.5, method=mc.Paper(epochs=2, updates=1), progress=False)
        held[steps] = peak
    assert held[24] == held[6] > 0


@pytest.mark.parametrize("verb", ["learn", "fit_reach"])
def test_a_forgotten_seed_is_told(case, verb):
    own, asked = sampler(case), iter(range(1000))

    def forgetful(seed):
        return own(next(asked))

    def told():
        if verb == "learn":
            return mc.learn(case.model, forgetful, 0.5, method=METHODS["search"], progress=False)
        mask = mc.schedules.uniform(program_of(case), timesteps_of(), interval=2, reuse="linear")
        return mc.fit_reach(case.model, mask, forgetful, progress=False)

    with pytest.raises(ValueError, match=r"sample\(0\) called the denoiser with other values when it was run again"):
        told()


def test_noise_of_the_steps_without_a_seed_is_told(case):
    """The first call is the same every time, those after it are not."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)

    def sample(seed):
        x = torch.randn(case.inputs(case.batch, 999, 0)[0][0].shape, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            with torch.no_grad():
                x = scheduler.step(tensors_of(case.model(x, t))[0], t, x, eta=1.0).prev_sample
        return x

    with pytest.raises(ValueError, match=r"sample\(0\) called the denoiser with other values when it was run again"):
        mc.learn(case.model, sample, 0.5, method=METHODS["search"], progress=False)


def program_of(case):
    args, kwargs = case.inputs(case.batch, 999, 0)
    return mc.trace(case.model, *args, **kwargs)


def timesteps_of():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler.timesteps


def test_an_outcome_that_is_always_the_same_is_told(case):
    own = sampler(case)
    with pytest.raises(ValueError, match="all of whose numbers are the same"):
        mc.learn(case.model, lambda seed: own(seed) * 0, 0.5, method=METHODS["search"], progress=False)


def test_numbers_of_numpy(case, tmp_path):
    def learned(seeds, budget, epochs):
        method = dataclasses.replace(QUICK, epochs=epochs)
        return mc.learn(case.model, sampler(case), budget, method=method, seeds=seeds, progress=False)

    mask = learned(np.arange(2), np.float32(0.5), np.int64(3))
    assert mask == learned([0, 1], 0.5, 3)
    mask.save(tmp_path / "mask.json")
    assert mc.Mask.load(tmp_path / "mask.json").provenance["options"]["epochs"] == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_bar_shows_share_and_fidelity_and_comes_to_its_end(case, monkeypatch, method):
    shown = io.StringIO()
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False}, file=shown, mininterval=0, ncols=120)
            bars.append(self)

    monkeypatch.setattr(sys.modules["maskcompile.learn"], "tqdm", Bar)
    options = METHODS[method]
    options = dataclasses.replace(options, reach=False) if method == "search" else options
    mc.learn(case.model, sampler(case), 0.5, method=options)
    lines = [line for line in shown.getvalue().split("\r") if line.strip()]
    assert re.search(r"fidelity=-?\d+\.\d dB.*share=0\.\d{3}|share=0\.\d{3}.*fidelity=-?\d+\.\d dB", lines[-1])
    assert bars[0].n == pytest.approx(bars[0].total, abs=1.0)


#: (step, one text, another one, what the step before was given) -> what the denoiser is given as its text
CONDITIONED = {
    "the same": lambda step, one, other, before: one,
    "another from the middle on": lambda step, one, other, before: one if step < 6 else other,
    "made anew, another from the middle on": lambda step, one, other, before: (one if step < 6 else other).clone(),
    "made anew at every third step": lambda step, one, other, before: before if step % 3 else one.clone(),
    "overwritten in the middle": lambda step, one, other, before: one.copy_(other) if step == 6 else one,
}


@pytest.mark.parametrize("method", ["search", "random"])
@pytest.mark.parametrize("conditioned", CONDITIONED)
def test_the_share_is_what_a_run_takes_however_conditioning_is_given(conditioned, method):
    """By the same values in other tensors, or other values in the same: torch counts what is executed."""
    case = denoiser("unet2d_condition")

    def sample(seed, model=case.model):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 4, 8, 8, generator=generator)
        one, other, text = (torch.randn(2, 5, 16, generator=generator) for _ in range(3))
        for step, t in enumerate(range(960, 0, -80)):
            text = CONDITIONED[conditioned](step, one, other, text)
            with torch.no_grad():
                x = x - 0.05 * tensors_of(model(x, torch.tensor(t), encoder_hidden_states=text))[0]
        return x

    def counted(model):
        with FlopCounterMode(display=False) as counter:
            sample(0, model)
        return counter.get_total_flops()

    options = mc.Search(passes=4, reach=False) if method == "search" else QUICK
    mask = mc.learn(case.model, sample, 0.6, method=options, progress=False)
    fast = mc.optimize(case.model, mask, backend="eager")
    sample(0, fast)  # which captures
    assert counted(fast) / counted(case.model) == pytest.approx(mask.provenance["share"], abs=2e-3)
    assert 0.59 <= mask.provenance["share"] <= 0.61


def test_a_pipeline_is_no_denoiser(case):
    pipe = diffusers.DDIMPipeline(case.model, DDIMScheduler())
    for call in (
        lambda: mc.learn(pipe, lambda seed: None, 0.5),
        lambda: mc.trace(pipe, torch.zeros(1)),
        lambda: mc.fit_reach(pipe, mc.Mask.full(["a"], [1]).replace(reuse="linear"), lambda seed: None),
    ):
        with pytest.raises(TypeError, match=r"of a pipeline its unet or transformer; got DDIMPipeline"):
            call()
