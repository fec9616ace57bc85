"""How far to reach at each step, fitted to samples: worth what it says by the executor, and no worse than trying all."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import maskcompile as mc
from maskcompile.learning import reach
from maskcompile.learning.fidelity import fidelity
from tests.denoisers import denoiser
from tests.executor import Executor
from tests.maskcompile.test_learn import executed, sampler
from tests.toys import Chain


class Pair(nn.Module):
    """Two blocks whose outputs bend over the timesteps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x, timestep):
        x = x + self.first(x * torch.cos(timestep / 300))
        return x + self.second(x * torch.sin(timestep / 200))


TIMESTEPS = (900, 750, 600, 450, 300, 150)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return Pair().eval()


def sample(seed, model, step=None, dtype=torch.int64):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for position, t in enumerate(TIMESTEPS):
            t = torch.tensor(t, dtype=dtype)
            x = x - 0.1 * (model(x, t) if step is None else step(position, x, t))
    return x


def decibels(model, mask, reach, seeds=(0, 1)):
    """By the executor."""
    found = []
    for seed in seeds:
        executor = Executor(model, mask.blocks, mask.compute, order=1, log_snr=mask.log_snr, reach=reach)
        found.append(fidelity(sample(seed, model, executor.step), sample(seed, model)))
    return float(np.concatenate(found).mean())


def test_it_finds_what_trying_all_finds(pair):
    """Two steps extrapolate: reach 0, 0.2, ... 4 of both, against two rounds of fitting."""
    compute = np.ones((6, 2), dtype=bool)
    compute[[2, 4]] = False
    mask = mc.Mask(compute, blocks=["first", "second"], timesteps=TIMESTEPS, reuse="linear", provenance={"by": "hand"})
    fitted = mc.fit_reach(pair, mask, lambda seed: sample(seed, pair), progress=False)
    assert fitted.replace(reach=None) == mask
    assert fitted.provenance["by"] == "hand"
    assert [r for step, r in enumerate(fitted.reach) if step not in (2, 4)] == [1, 1, 1, 1]
    tried = [[1, 1, a, 1, b, 1] for a, b in itertools.product(np.linspace(0, 4, 21), repeat=2)]
    best = max(decibels(pair, mask, reach) for reach in tried)
    assert decibels(pair, mask, None) + 1 < best
    assert decibels(pair, mask, fitted.reach) > best - 0.25
    assert decibels(pair, mask, fitted.reach, seeds=range(10, 30)) > decibels(pair, mask, None, seeds=range(10, 30)) + 1


def test_a_published_schedule_gains_on_noise_not_seen():
    case = denoiser("unet2d")
    run = sampler(case)
    args, kwargs = case.inputs(case.batch, 999, 0)
    program = mc.trace(case.model, *args, **kwargs)
    timesteps = [875, 750, 625, 500, 375, 250, 125, 0]
    mask = mc.schedules.uniform(program, timesteps, 3, warmup=2, reuse="linear")
    fitted = mc.fit_reach(case.model, mask, run, progress=False)
    gains = []
    for seed in range(20, 24):
        before, after = (executed(case, m, seed, order=1) for m in (mask, fitted))
        gains.append(fidelity(after, run(seed)).mean() - fidelity(before, run(seed)).mean())
    assert min(gains) > 0


def test_learning_does_it_by_itself():
    case = denoiser("unet2d")
    searched, learned = (
        mc.learn(case.model, sampler(case), 0.5, method=mc.Search(passes=8, reach=reach), reuse="linear", progress=False)
        for reach in (False, True)
    )
    assert searched.reach is None
    assert learned == mc.fit_reach(case.model, searched, sampler(case), progress=False)
    assert learned.reach is not None
    assert learned.provenance["fidelity_db"] > searched.provenance["fidelity_db"]
    assert learned.provenance["passes"] > searched.provenance["passes"]


def test_where_nothing_is_gained_the_mask_comes_back():
    """The blocks return the same at every step, so that reaching further changes nothing."""

    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x, timestep):
            return x * torch.cos(timestep / 300) + self.block(torch.ones_like(x))

    model = Still().eval()
    mask = mc.Mask([[True], [True], *[[False]] * 4], blocks=["block"], timesteps=TIMESTEPS, reuse="linear")
    assert mc.fit_reach(model, mask, lambda seed: sample(seed, model), progress=False) is mask


def test_long_runs_share_factors_and_large_outcomes_take_part_in_part(pair, monkeypatch):
    """As good, with less to fit: one factor for the two steps, and 5 of 8 numbers of each element."""
    compute = np.ones((6, 2), dtype=bool)
    compute[[2, 4]] = False
    mask = mc.Mask(compute, blocks=["first", "second"], timesteps=TIMESTEPS, reuse="linear")
    monkeypatch.setattr(reach, "MOST_FACTORS", 1)
    monkeypatch.setattr(reach, "MOST_NUMBERS", 5)
    fitted = mc.fit_reach(pair, mask, lambda seed: sample(seed, pair), progress=False)
    assert fitted.reach[2] == fitted.reach[4] != 1
    best = max(decibels(pair, mask, [1, 1, a, 1, a, 1]) for a in np.linspace(0, 4, 41))
    assert decibels(pair, mask, fitted.reach) > best - 1


def test_nothing_is_given_a_reach_beyond_what_counts(pair):
    """From reach 4, where both steps are bounded and slopes forward are zero, it finds back."""
    compute = np.ones((6, 2), dtype=bool)
    compute[[2, 4]] = False
    mask = mc.Mask(compute, blocks=["first", "second"], timesteps=TIMESTEPS, reuse="linear", reach=[1, 1, 4, 1, 4, 1])
    fitted = mc.fit_reach(pair, mask, lambda seed: sample(seed, pair), progress=False)
    assert max(fitted.reach) <= 1.5  # c is 1 at both
    assert decibels(pair, mask, fitted.reach) > decibels(pair, mask, None)


def test_a_single_sample_is_not_fitted_to(pair):
    mask = mc.Mask(np.eye(6, 2, dtype=bool), blocks=["first", "second"], timesteps=TIMESTEPS, reuse="linear")
    mask = mask.replace(mask.compute | (np.arange(6) < 3)[:, None])
    assert mc.fit_reach(pair, mask, lambda seed: sample(seed, pair)[:1], seeds=[0], progress=False) is mask
    assert mc.fit_reach(pair, mask, lambda seed: sample(seed, pair)[:1], seeds=[0, 1], progress=False).reach is not None


def test_timesteps_match_within_their_rounding(pair):
    """As a pipeline in bfloat16 rounds them."""
    compute = np.ones((6, 2), dtype=bool)
    compute[[2, 4]] = False
    exact = [t + 0.3 for t in TIMESTEPS]
    mask = mc.Mask(compute, blocks=["first", "second"], timesteps=exact, reuse="linear")

    def rounded(seed):
        return sample(seed, pair, dtype=torch.bfloat16)

    assert mc.fit_reach(pair, mask, rounded, progress=False).reach is not None
    exact[3] = 500
    with pytest.raises(mc.MaskError, match="at step 3 the mask has 500 and the sampler 450"):
        mc.fit_reach(pair, mask.resample(exact), rounded, progress=False)


def test_a_reach_is_for_the_rows_that_it_was_fitted_to():
    compute = np.array([[1, 1], [1, 1], [0, 1], [0, 0], [1, 0], [0, 0]], dtype=bool)
    factors = [1, 1, 0.5, 2, 1.5, 0.25]
    mask = mc.Mask(compute, blocks=["first", "second"], timesteps=TIMESTEPS, reuse="linear", reach=factors)
    assert mask.replace(seed=3).reach == mask.replace(compute, reuse="linear").reach == tuple(factors)
    assert mask.replace(~compute).reach is mask.replace(reuse="hold").reach is mask.replace(log_snr=range(6)).reach is None
    assert (mask | mask).reach == tuple(factors)
    torch.manual_seed(0)
    model = Pair().eval()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    program = mc.trace(model, x, torch.tensor(900), blocks=["first", "second"])
    assert mc.rectify(mask, program).reach == tuple(factors)
    assert mc.rectify(mask, program, rules=["reused_inputs"]).reach == tuple(factors)  # which finds nothing in it
    chain = mc.trace(Chain().eval(), torch.randn(2, 4), torch.tensor(900), blocks=["a", "b", "c"])
    other = mc.Mask(np.array([[1, 1, 1], [0, 0, 1]]) > 0, blocks=list("abc"), timesteps=[2, 1], reuse="linear", reach=[1, 2])
    assert mc.rectify(other, chain).reach == (1, 2)
    assert mc.rectify(other, chain, rules=["reused_inputs"]).reach is None
    for most, kept in ((6, True), (1, False)):  # nothing to merge, and all rows merged
        fast = mc.optimize(model, mask, backend="eager", max_graphs=most)
        executor = Executor(model, mask.blocks, compute if kept else np.ones_like(compute), order=1, reach=factors)
        assert torch.equal(sample(0, fast), sample(0, model, executor.step))


def test_bad_input(pair):
    mask = mc.Mask(np.eye(6, 2, dtype=bool), blocks=["first", "second"], timesteps=TIMESTEPS, reuse="linear")

    def run(seed):
        return sample(seed, pair)

    with pytest.raises(mc.MaskError, match=r"nothing reaches anywhere: mask\.replace\(reuse='linear'\) does"):
        mc.fit_reach(pair, mask.replace(reuse="hold"), run)
    with pytest.raises(mc.MaskError, match=r"names block 'second', which Linear does not have|'first', which Linear"):
        mc.fit_reach(nn.Linear(8, 8).eval(), mask, run)
    with pytest.raises(
        mc.MaskError,
        match=r"for 3 timesteps and sample\(0\) called the denoiser at 6; at step 1 the mask has 600 and the sampler 750",
    ):
        mc.fit_reach(pair, mask.resample([900, 600, 300]), run)
    for seeds in ((), (0, 0)):
        with pytest.raises(ValueError, match="seeds are one or more different numbers"):
            mc.fit_reach(pair, mask, run, seeds=seeds)
    with pytest.raises(TypeError, match=r"fitted to a maskcompile\.Mask; got ndarray"):
        mc.fit_reach(pair, mask.compute, run)
    with pytest.raises(ValueError, match="already optimised; fit with the original"):
        mc.fit_reach(mc.optimize(pair, mask, backend="eager"), mask, run)


def test_files_keep_it(tmp_path):
    mask = mc.Mask(np.eye(6, 2, dtype=bool), blocks=["a", "b"], timesteps=TIMESTEPS, reuse="linear", reach=[1, 1, 0.5, 2, 0, 4])
    mask.save(tmp_path / "mask.json")
    document = json.loads((tmp_path / "mask.json").read_text())
    assert (document["version"], document["reach"]) == (3, [1, 1, 0.5, 2, 0, 4])
    assert mc.Mask.load(tmp_path / "mask.json") == mask != mask.replace(reach=None)
    assert "with a reach of its own at each step" in repr(mask)
    assert str(mask).splitlines()[-1] == "reach of each step: 1 1 0.5 2 0 4"
    assert mask.resample(TIMESTEPS) == mask
    assert mask.resample(TIMESTEPS[::2]).reach is None  # it was fitted to other gaps
    with pytest.raises(mc.MaskError, match="log-SNR and reach"):
        mask | mask.replace(reach=None)
