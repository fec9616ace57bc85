"""What happens to a pipeline in its life: dtypes, layouts, adapters, offloading, saving, sizes, other schedulers and step counts."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial

import accelerate
import diffusers
import numpy as np
import pytest
import torch

import maskcompile as mc
from tests.maskcompile.pipelines.hooked import HookedDenoiser
from tests.maskcompile.pipelines.test_exact import random_mask, recorded
from tests.maskcompile.pipelines.tiny import TINY, _prompt, text2img, wan_two_experts


def optimised(name="text2img", seed=1):
    """(pipe, run, mask, optimised denoiser) on a copy of the tiny pipeline's denoiser, which a test may change."""
    pipe, run = TINY[name]()
    pipe.unet = copy.deepcopy(pipe.unet)
    _, timesteps, _ = recorded(pipe, "unet", run)
    mask = random_mask(mc.Mask.full(mc.block_names(pipe.unet), timesteps), seed)
    mc.optimize(pipe, mask, backend="eager")
    return pipe, run, mask, pipe.unet


def assert_is_the_executor(pipe, run, mask, seed=5, **given):
    """Returns what the pipeline samples."""
    fast = pipe.unet
    ours = run(pipe, seed=seed, **given)
    pipe.unet = HookedDenoiser(fast.original, mask)
    theirs = run(pipe, seed=seed, **given)
    pipe.unet = fast
    assert torch.equal(ours, theirs)
    return ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe, run, mask, fast = optimised()
    prompts = {name: tensor.to(dtype) for name, tensor in _prompt().items()}
    before = assert_is_the_executor(pipe, run, mask)
    pipe.to(dtype)
    assert fast.dtype == fast.original.dtype == pipe.dtype == dtype
    assert pipe.device == fast.device == torch.device("cpu")
    ours = assert_is_the_executor(pipe, run, mask, **prompts)
    assert ours.dtype == dtype
    assert ours.isfinite().all()
    pipe.to(torch.float32)  # rounded once
    assert not torch.equal(assert_is_the_executor(pipe, run, mask), before)
    assert fast.report().recaptures == 2


def test_channels_last():
    pipe, run, mask, fast = optimised()
    pipe.unet.to(memory_format=torch.channels_last)
    assert fast.original.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_is_the_executor(pipe, run, mask)


def test_lora_is_loaded_switched_and_unloaded():
    peft = pytest.importorskip("peft")
    pipe, run, mask, _fast = optimised()
    sampled = [assert_is_the_executor(pipe, run, mask)]
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name=name)
        sampled.append(assert_is_the_executor(pipe, run, mask))
    pipe.unet.set_adapter("first")
    sampled.append(assert_is_the_executor(pipe, run, mask))
    assert torch.equal(sampled[3], sampled[1])
    pipe.unet.set_adapters(["first", "second"], [0.5, 0.7])
    sampled.append(assert_is_the_executor(pipe, run, mask))
    pipe.unet.disable_adapters()
    assert torch.equal(assert_is_the_executor(pipe, run, mask), sampled[0])
    pipe.unet.enable_adapters()
    pipe.unet.fuse_lora(adapter_names=["first"])
    sampled.append(assert_is_the_executor(pipe, run, mask))
    pipe.unet.unfuse_lora()
    pipe.unet.unload_lora()
    assert torch.allclose(assert_is_the_executor(pipe, run, mask), sampled[0], rtol=1e-3, atol=1e-2)
    assert all(not torch.equal(a, b) for i, a in enumerate(sampled) for b in sampled[:i] if i != 3)


def test_fused_projections():
    pipe, run, mask, fast = optimised()
    before = assert_is_the_executor(pipe, run, mask)
    pipe.unet.fuse_qkv_projections()
    assert hasattr(fast.original.down_blocks[0].attentions[0].transformer_blocks[0].attn1, "to_qkv")
    assert torch.allclose(assert_is_the_executor(pipe, run, mask), before, rtol=1e-3, atol=1e-2)
    assert fast.report().recaptures == 1
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(assert_is_the_executor(pipe, run, mask), before)


def ip_adapter(unet, width=12, tokens=4):
    """The weights of an IP-adapter for this UNet, random."""
    torch.manual_seed(0)
    into = unet.config.cross_attention_dim
    keys = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    values = {}
    for position, name in enumerate(keys):
        out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        values |= {f"{2 * position + 1}.to_{kind}_ip.weight": torch.randn(out, into) for kind in "kv"}
    projection = {
        "proj.weight": torch.randn(tokens * into, width), "proj.bias": torch.randn(tokens * into), "norm.weight": torch.ones(into),
        "norm.bias": torch.zeros(into),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": values}


def test_ip_adapter_embeddings():
    pipe, run, mask, fast = optimised()
    without = assert_is_the_executor(pipe, run, mask)
    pipe.unet._load_ip_adapter_weights([ip_adapter(fast.original)], low_cpu_mem_usage=False)
    pictures = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(0))  # without and with guidance
    sampled = []
    for scale in (1.0, 0.3):
        pipe.set_ip_adapter_scale(scale)
        sampled.append(assert_is_the_executor(pipe, run, mask, ip_adapter_image_embeds=[pictures]))
    assert not torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], without)


def test_model_offloading_outside_changes_nothing():
    """As enable_model_cpu_offload after optimize: the hook sits on the optimised denoiser."""
    pipe, run, mask, fast = optimised()
    before = assert_is_the_executor(pipe, run, mask)
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    for _ in range(2):
        assert torch.equal(run(pipe, seed=5), before)
        hook.offload()
    assert (fast.report().recaptures, fast.report().uncaptured) == (0, ())
    accelerate.hooks.remove_hook_from_module(pipe.unet)
    assert torch.equal(assert_is_the_executor(pipe, run, mask), before)


@pytest.mark.parametrize("when", ["before", "after the first run"])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloading_within_is_skipped_module_by_module(kind, when):
    pipe, run, mask, fast = optimised()
    before = run(pipe, seed=5) if when != "before" else None
    if kind == "model":
        accelerate.cpu_offload_with_hook(fast.original, execution_device="cpu")
    elif kind == "sequential":
        for model in (fast.original, pipe.vae):
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in fast.original.parameters())
    else:
        fast.original.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.warns(UserWarning, match=r"has an? \w+ hook .*Its blocks are skipped module by module"):
        sampled = assert_is_the_executor(pipe, run, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(assert_is_the_executor(pipe, run, mask), sampled)
    assert before is None or torch.equal(sampled, before)
    assert " hook (" in fast.report().uncaptured[0][1]
    if kind != "group":
        accelerate.hooks.remove_hook_from_module(fast.original, recurse=True)
        assert torch.equal(run(pipe, seed=5), sampled)
        assert not fast.report().uncaptured


def test_saving_a_pipeline_saves_the_original(tmp_path):
    pipe, run, mask, fast = optimised("ddim")
    sampled = run(pipe)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is diffusers.UNet2DModel
    pipe.unet = fast.original
    assert torch.equal(run(again), run(pipe))
    mc.optimize(again, mask, backend="eager")
    assert torch.equal(run(again), sampled)
    assert isinstance(again.unet, diffusers.UNet2DModel)
    assert isinstance(again.unet, mc.OptimizedDenoiser)


def test_pickled_and_copied_denoisers_sample_the_same():
    pipe, run, _mask, fast = optimised("ddim")
    sampled = run(pipe)
    for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert other.original is not fast.original
        pipe.unet = other
        assert torch.equal(run(pipe), sampled)


def test_components_are_shared_between_pipelines():
    """A second pipeline around the same optimised denoiser."""
    pipe, run, _mask, fast = optimised()
    sampled = run(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert other.unet is fast
    other(**_prompt(), image=torch.rand(2, 3, 64, 64), strength=0.7, num_inference_steps=6, output_type="latent")
    assert torch.equal(run(pipe), sampled)


def test_two_experts_follow_one_mask_or_one_each():
    pipe, sample = wan_two_experts()
    run = partial(sample, num_inference_steps=9)
    names = ("transformer", "transformer_2")
    originals = {name: getattr(pipe, name) for name in names}
    _, first, _ = recorded(pipe, "transformer", run)
    original, second, _ = recorded(pipe, "transformer_2", run)
    assert not set(first) & set(second)
    full = mc.Mask.full(mc.block_names(pipe.transformer), [*first, *second])
    mask, other = random_mask(full, 1), random_mask(full, 2)
    for masks, given in ((dict.fromkeys(names, mask), mask), ({"transformer": mask, "transformer_2": other},) * 2):
        assert mc.optimize(pipe, given, backend="eager") is pipe
        sampled = [run(pipe), run(pipe)]
        for name in names:
            assert getattr(pipe, name).report().reusing_calls > 0
            setattr(pipe, name, HookedDenoiser(originals[name], masks[name]))
        for ours in sampled:
            assert torch.equal(ours, run(pipe))
        for name in names:
            setattr(pipe, name, originals[name])
    with pytest.raises(ValueError, match=r"WanPipeline has no denoiser 'unet'; its modules are transformer, transformer_2\."):
        mc.optimize(pipe, {"transformer": mask, "unet": mask})
    assert {name: getattr(pipe, name) for name in names} == originals
    assert torch.equal(run(pipe), original)


SCHEDULERS = {
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "dpm++_2m": lambda: diffusers.DPMSolverMultistepScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "dpm++_sde": lambda: diffusers.DPMSolverSDEScheduler(noise_sampler_seed=0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
}


@pytest.fixture(scope="module")
def shared():
    """One capture for all schedulers."""
    pipe, run = text2img()
    fast = mc.optimize(pipe.unet, mc.Mask.full(mc.block_names(pipe.unet), [0.0]), backend="eager")
    return pipe, run, fast


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(shared, name):
    if name == "dpm++_sde":
        pytest.importorskip("torchsde")
    pipe, run, fast = shared
    pipe.scheduler = SCHEDULERS[name]()
    pipe.unet = fast.original
    original, timesteps, calls = recorded(pipe, "unet", run)
    full = mc.Mask.full(fast.mask.blocks, timesteps)
    pipe.unet = fast
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Should have t")  # torchsde's, of rounding
        fast.set_mask(full)
        assert torch.equal(run(pipe), original)
        for rule in ("hold", "linear"):
            fast.set_mask(random_mask(full, 3, reuse=rule))
            assert not torch.equal(assert_is_the_executor(pipe, run, fast.mask), original)
            report = fast.report()
            assert (report.calls, report.unknown_timesteps, report.skips) == (sum(calls), 0, 0)
            assert report.reusing_calls > 0


def test_a_mask_of_50_steps_in_a_run_of_30():
    pipe, run = TINY["ddim"]()
    original, thirty, _ = recorded(pipe, "unet", lambda pipe: run(pipe, num_inference_steps=30))
    _, fifty, _ = recorded(pipe, "unet", lambda pipe: run(pipe, num_inference_steps=50))
    mask = random_mask(mc.Mask.full(mc.block_names(pipe.unet), fifty), 1)
    mc.optimize(pipe, mask, backend="eager")
    with pytest.warns(UserWarning, match="the mask") as said:
        assert torch.equal(run(pipe, num_inference_steps=30), original)
    assert [str(w.message) for w in said if "mask" in str(w.message)] == [
        "the mask (50 steps, 980 to 0) does not know timestep 957; such calls compute every block. Use the scheduler and number of "
        "steps that the mask was made for, or fast.set_mask(mask.resample(timesteps)) with the timesteps that the denoiser is called "
        "with."
    ]
    report = pipe.unet.report()
    assert report.unknown_timesteps == len(set(thirty) - set(fifty)) == 28
    assert report.reusing_calls == 0
    assert "calls          30, of which 0 reused at least one block" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.unet.set_mask(mask.resample(pipe.scheduler.timesteps))
        sampled = assert_is_the_executor(pipe, run, pipe.unet.mask, num_inference_steps=30)
    assert not torch.equal(sampled, original)
    assert pipe.unet.report().reusing_calls == 29


def test_a_mask_of_50_steps_in_a_run_of_25():
    """Every second step of the mask: each computes also what the mask computes at the one left out before it."""
    pipe, run = TINY["ddim"]()
    timesteps = {}
    for steps in (25, 50):
        _, timesteps[steps], _ = recorded(pipe, "unet", lambda pipe, steps=steps: run(pipe, num_inference_steps=steps))
    assert timesteps[25] == timesteps[50][1::2]
    mask = random_mask(mc.Mask.full(mc.block_names(pipe.unet), timesteps[50]), 1)
    either = mask.compute[1::2] | np.vstack([mask.compute[1], mask.compute[2::2]])
    mc.optimize(pipe, mask, backend="eager")
    with pytest.warns(UserWarning, match="the mask") as said:
        sampled = run(pipe, num_inference_steps=25)
    assert sum("skips from step 1 of the mask to step 3" in str(w.message) for w in said) == 1 == len(said)
    report = pipe.unet.report()
    assert (report.unknown_timesteps, report.skips, report.reusing_calls) == (0, 24, int((~either[1:].all(1)).sum()))
    pipe.unet = HookedDenoiser(pipe.unet.original, mc.Mask(either, blocks=mask.blocks, timesteps=timesteps[25]))
    assert torch.equal(run(pipe, num_inference_steps=25), sampled)


def test_sizes_in_turn_are_captured_once_each_and_the_least_recent_let_go():
    pipe, run, mask, fast = optimised()
    pipe.unet = mc.optimize(fast.original, mask, backend="eager", max_captures=2)
    sampled = {}
    for size in (64, 80, 64, 80):
        sampled[size] = assert_is_the_executor(pipe, run, mask, height=size, width=size)
        assert len(pipe.unet.report().signatures) <= 2
    captured = dict(pipe.unet._captures)
    assert_is_the_executor(pipe, run, mask, height=64, width=64)
    assert_is_the_executor(pipe, run, mask, height=96, width=64)  # 80 x 80 is let go of
    assert len(set(captured) & set(pipe.unet._captures)) == 1
    assert len(pipe.unet.report().signatures) == 2
    for size, expected in sampled.items():
        assert torch.equal(run(pipe, seed=5, height=size, width=size), expected)


def test_undo():
    pipe, run, _mask, fast = optimised()
    model = fast.original
    assert run(pipe) is not None
    pipe.unet = pipe.unet.original
    assert pipe.unet is model
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert "forward" not in vars(model)


def test_warmed_up_before_the_pipeline_first_runs():
    """cache_context puts a registry of hooks on the denoiser at its first call; it holds none, and nothing is captured again."""
    pipe, run = TINY["flux_guided_separately"]()
    pipe.transformer = copy.deepcopy(pipe.transformer)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run(pipe)
    hook.remove()
    fresh = copy.deepcopy(pipe.transformer)
    vars(fresh).pop("_diffusers_hook", None)
    mask = random_mask(mc.Mask.full(mc.block_names(fresh), [float(kwargs["timestep"][0]) for _, kwargs in calls]), 1)
    pipe.transformer = mc.optimize(fresh, mask, backend="eager")
    pipe.transformer.warmup(*calls[0][0], **calls[0][1])
    assert "_diffusers_hook" not in vars(fresh)
    sampled = run(pipe)
    assert "_diffusers_hook" in vars(fresh)
    report = pipe.transformer.report()
    assert (report.recaptures, len(report.signatures), report.unknown_timesteps) == (0, 1, 0)
    assert report.reusing_calls > 0
    pipe.transformer = HookedDenoiser(fresh, mask)
    assert torch.equal(run(pipe), sampled)


def test_a_setting_given_to_the_drop_in_is_the_originals():
    """As LoRA scales, attention settings and flags are set by code that holds the denoiser."""

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), 1.0

        def forward(self, sample, timestep):
            return self.body(sample) * self.scale

    model = Scaled().eval()
    fast = mc.optimize(model, mc.Mask.full(["body"], [2.0, 1.0]), backend="eager")
    sample = torch.randn(2, 4)
    before = fast(sample, torch.tensor(2.0))
    fast.scale = 3.0
    assert model.scale == 3.0
    assert "scale" not in vars(fast)
    assert torch.equal(fast(sample, torch.tensor(2.0)), 3 * before)
    fast.note = "mine"  # which the original does not have
    assert not hasattr(model, "note")
    fast._compiled_call_impl = None  # of every module
    assert "_compiled_call_impl" not in vars(model)


def test_lora_by_the_pipelines_own_functions(tmp_path):
    """load_lora_weights from a file, set_adapters, disable, unload_lora_weights."""
    peft = pytest.importorskip("peft")
    pipe, run, mask, fast = optimised()
    before = assert_is_the_executor(pipe, run, mask)
    for name in ("first", "second"):
        donor = copy.deepcopy(fast.original)
        donor.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        layers = peft.get_peft_model_state_dict(donor)
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / name, unet_lora_layers=layers)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    sampled = []
    for names, weights in ((["first"], [1.0]), (["first"], [0.5]), (["second"], [1.0]), (["first", "second"], [1.0, 0.5])):
        pipe.set_adapters(names, weights)
        assert pipe.get_active_adapters() == names
        sampled.append(assert_is_the_executor(pipe, run, mask))
    assert not any(torch.equal(a, b) for i, a in enumerate([before, *sampled]) for b in sampled[i:])
    pipe.disable_lora()
    assert torch.equal(assert_is_the_executor(pipe, run, mask), before)
    pipe.unload_lora_weights()
    assert torch.equal(assert_is_the_executor(pipe, run, mask), before)
    assert pipe.unet is fast
