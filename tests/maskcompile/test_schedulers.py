"""The log-SNR of diffusers' schedulers, against the noise that they themselves add."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import maskcompile as mc


def added(scheduler, timestep):
    """log(alpha^2 / sigma^2) from what the scheduler makes of a one without noise and of noise alone."""
    one, none, at = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), timestep.reshape(1)
    add = getattr(scheduler, "add_noise", None) or (lambda x, noise, t: scheduler.scale_noise(x, t, noise))
    alpha, sigma = add(one, none, at).item(), add(none, one, at).item()
    return 2 * np.log(max(alpha, 1e-4) / max(sigma, 1e-4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "scaled_linear"}),
        ("UniPCMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
        ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear", "use_karras_sigmas": True}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_it_is_the_noise_that_is_added(name, options):
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(12)
    ours = np.array(mc.log_snr(scheduler))
    theirs = np.array([added(scheduler, t) for t in scheduler.timesteps])
    assert np.all(np.diff(ours) > 0)
    middle = np.abs(theirs) < 12
    assert middle.sum() >= 10
    assert np.allclose(ours[middle], theirs[middle], atol=0.05)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_max": 700.0, "use_karras_sigmas": True},
        ),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "scaled_linear", "use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {}),
        ("EDMEulerScheduler", {}),
    ],
)
def test_it_is_the_sigma_of_each_step(name, options):
    """Stable Video Diffusion's continuous timesteps, 2nd-order solvers, EDM: sigma is in units of the signal."""
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(9)
    theirs = dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))
    assert np.allclose(mc.log_snr(scheduler), [-2 * np.log(sigma) for sigma in theirs.values()], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
def test_midpoints_between_the_sigmas(options):
    """DPM++ SDE calls the denoiser at midpoints too, and its sigmas say nothing of these: what the training noise says does."""
    scheduler = diffusers.DPMSolverSDEScheduler(beta_schedule="scaled_linear", **options)
    scheduler.set_timesteps(10)
    power = scheduler.alphas_cumprod.double().numpy()
    at = np.array(list(dict.fromkeys(scheduler.timesteps.tolist())))
    theirs = np.interp(at, np.arange(len(power)), np.log(power / (1 - power)))
    ours = np.array(mc.log_snr(scheduler))
    assert len(ours) == 19
    assert np.all(np.diff(ours) > 0)
    assert np.allclose(ours, theirs, atol=1e-3)
    sigmas = np.array(list(dict.fromkeys(scheduler.sigmas.tolist())))[:10]  # of the steps, apart from the last, zero
    inside = np.abs(ours[::2]) < 12
    assert np.allclose(ours[::2][inside], -2 * np.log(sigmas)[inside], atol=0.05)


def test_directions():
    """Inverted sigmas (Mochi) count the signal; inversion runs from the picture to noise."""
    plain, inverted = (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=invert) for invert in (False, True))
    plain.set_timesteps(6), inverted.set_timesteps(6)
    assert np.allclose(mc.log_snr(plain)[1:], mc.log_snr(inverted)[1:], atol=1e-3)
    scheduler = diffusers.DDIMInverseScheduler()
    scheduler.set_timesteps(6)
    assert np.all(np.diff(mc.log_snr(scheduler)) < 0)


def test_repeated_and_chosen_timesteps():
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    assert len(mc.log_snr(scheduler)) == 6 < len(scheduler.timesteps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    assert mc.log_snr(scheduler, scheduler.timesteps[2:]) == mc.log_snr(scheduler)[2:]
    with pytest.raises(ValueError, match="no timestep 123; call set_timesteps first"):
        mc.log_snr(scheduler, [123])
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="leave them out"):
        mc.log_snr(scheduler, scheduler.timesteps / 1000)


def test_a_scheduler_without_a_noise_schedule_is_named():
    class Bare:
        timesteps = torch.arange(3)

    with pytest.raises(ValueError, match="the log-SNR of Bare is not known"):
        mc.log_snr(Bare())
    scheduler = diffusers.ScoreSdeVeScheduler()
    scheduler.set_timesteps(6), scheduler.set_sigmas(6)
    with pytest.raises(ValueError, match="the log-SNR of ScoreSdeVeScheduler is not known"):
        mc.log_snr(scheduler)
