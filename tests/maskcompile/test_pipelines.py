"""Real diffusers pipelines with the denoiser replaced."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import maskcompile as mc
from tests.denoisers import denoiser
from tests.executor import Executor

STEPS = 6


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    diffusers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "progress_bar", _no_bar)


def _no_bar(self, iterable=None, total=None):
    class Bar:
        def __iter__(self):
            return iter(iterable)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def update(self, n=1):
            pass

    return Bar()


class HookedDenoiser(torch.nn.Module):
    """The executor in a pipeline's place for the denoiser: row by timestep."""

    def __init__(self, executor, timesteps):
        super().__init__()
        self.executor, self.timesteps = executor, [int(t) for t in timesteps]
        self.inner = executor.model

    def forward(self, sample, timestep=None, **kwargs):
        step = self.timesteps.index(int(torch.as_tensor(timestep).reshape(-1)[0]))
        if step == 0:
            self.executor.reset()
        return self.executor.step(step, sample, timestep, **kwargs)

    @property
    def dtype(self):
        return self.inner.dtype

    @property
    def device(self):
        return self.inner.device

    @property
    def config(self):
        return self.inner.config


def random_mask(program, timesteps, seed=0):
    compute = np.random.default_rng(seed).random((len(timesteps), len(program.names))) < 0.4
    return mc.Mask(compute, blocks=program.names, timesteps=timesteps)


@pytest.mark.parametrize("kind", ["DDIM", "DDPM"])
def test_unconditional_pipelines(kind):
    case = denoiser("unet2d")
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.clone()
    program = mc.trace(case.model, torch.randn(2, 3, 16, 16), 1)
    mask = random_mask(program, timesteps)

    def pictures(unet, batch=2, seed=0):
        pipe = getattr(diffusers, f"{kind}Pipeline")(case.model, scheduler)
        pipe.unet = unet
        return pipe(batch, torch.Generator().manual_seed(seed), num_inference_steps=STEPS, output_type="np").images

    full = mc.optimize(case.model, mc.Mask.full(program.names, timesteps), backend="eager")
    fast = mc.optimize(case.model, mask, backend="eager")
    truth = HookedDenoiser(Executor(case.model, mask.blocks, mask.compute), timesteps)
    original = pictures(case.model)
    assert np.array_equal(pictures(full), original)
    for seed, batch in ((0, 2), (1, 2), (2, 3)):  # two runs in a row, then another batch
        expected = pictures(truth, batch, seed)
        assert np.array_equal(pictures(fast, batch, seed), expected)
    assert not np.array_equal(pictures(fast), original)


def test_dit_pipeline_with_batched_guidance():
    case = denoiser("dit")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.clone()
    args, kwargs = case.inputs(2, 1, 0)
    program = mc.trace(case.model, *args, **kwargs)
    mask = random_mask(program, timesteps, 1)
    # The pipeline's null class is 1000; the tiny denoiser has ten classes.
    model = diffusers.DiTTransformer2DModel.from_config({**case.model.config, "num_embeds_ada_norm": 1000}).eval()

    def pictures(transformer):
        pipe = diffusers.DiTPipeline(model, vae, scheduler)
        pipe.transformer = transformer
        generator = torch.Generator().manual_seed(3)
        return pipe([1, 7], guidance_scale=4.0, generator=generator, num_inference_steps=STEPS, output_type="np").images

    full = mc.optimize(model, mc.Mask.full(program.names, timesteps), backend="eager")
    fast = mc.optimize(model, mask, backend="eager")
    original = pictures(model)
    assert np.array_equal(pictures(full), original)
    expected = pictures(HookedDenoiser(Executor(model, mask.blocks, mask.compute), timesteps))
    for _ in range(2):
        assert np.array_equal(pictures(fast), expected)


def test_a_sampling_loop_that_starts_in_the_middle():
    """As image-to-image does: the first steps of the schedule never happen."""
    case = denoiser("unet2d")
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.clone()
    program = mc.trace(case.model, torch.randn(2, 3, 16, 16), 1)
    mask = random_mask(program, timesteps, 2)
    fast = mc.optimize(case.model, mask, backend="eager")
    executor = Executor(case.model, mask.blocks, mask.compute)
    ours = theirs = torch.randn(2, 3, 16, 16)
    for step in range(2, STEPS):
        t = timesteps[step]
        ours = scheduler.step(fast(ours, t).sample, t, ours).prev_sample
        theirs = scheduler.step(executor.step(step, theirs, t).sample, t, theirs).prev_sample
        assert torch.equal(ours, theirs)


def test_a_pipeline_keeps_working_around_it(tmp_path):
    case = denoiser("unet2d")
    pipe = diffusers.DDIMPipeline(case.model, diffusers.DDIMScheduler())
    pipe.unet = mc.optimize(case.model, mc.Mask.full(["mid_block.resnets.0"], [999]), backend="eager")
    assert pipe.device == torch.device("cpu")
    pipe.to(torch.float64)
    assert case.model.dtype == torch.float64
    pipe.to(torch.float32)
