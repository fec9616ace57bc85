"""Each mistake is one clear sentence, and leaves pipeline, denoiser and run as they were."""

from __future__ import annotations

import copy
import warnings

import diffusers
import numpy as np
import pytest
import torch

import maskcompile as mc
from tests.architectures import architecture
from tests.maskcompile.pipelines.test_exact import random_mask, recorded
from tests.maskcompile.pipelines.tiny import TINY


@pytest.fixture(scope="module")
def optimised():
    pipe, run = TINY["pixart_alpha"]()
    model = pipe.transformer
    _, timesteps, _ = recorded(pipe, "transformer", run)
    mask = random_mask(mc.Mask.full(mc.block_names(model), timesteps), 1)
    mc.optimize(pipe, mask, backend="eager")
    return pipe, run, mask, run(pipe)


@pytest.fixture
def unchanged(optimised):
    """(pipe, its denoiser); afterwards it samples what it did."""
    pipe, run, _, sampled = optimised
    before = dict(pipe.components)
    yield pipe, pipe.transformer
    assert dict(pipe.components) == before
    captures = len(pipe.transformer._captures)
    assert torch.equal(run(pipe), sampled)
    assert len(pipe.transformer._captures) == captures == 1


def test_a_denoiser_that_is_optimised_already(unchanged, optimised):
    pipe, fast = unchanged
    for given in (pipe, fast):
        with pytest.raises(
            ValueError, match=r"already optimised; use fast\.set_mask\(mask\), or optimize\(fast\.original, mask\)"
        ):
            mc.optimize(given, optimised[2])
    with pytest.raises(ValueError, match="already optimised; learn with the original"):
        mc.learn(fast, lambda seed: None, 0.5)


def test_something_else_than_a_denoiser_or_pipeline(unchanged, optimised):
    pipe, fast = unchanged
    with pytest.raises(TypeError, match=r"takes a denoiser \(nn\.Module\), or a pipeline with one; got DDIMScheduler"):
        mc.optimize(diffusers.DDIMScheduler(), optimised[2])
    with pytest.raises(TypeError, match=r"takes a Mask; got str\. Mask\.load\(path\) reads a file"):
        mc.optimize(fast.original, "mask.json")
    with pytest.raises(
        ValueError, match=r"PixArtAlphaPipeline has no denoiser 'unet'; its modules are transformer, vae|vae, transformer"
    ):
        mc.optimize(pipe, {"unet": optimised[2]})


def test_a_mask_of_another_checkpoint_family(unchanged, optimised):
    """Same block names, wider blocks: the hash differs."""
    _pipe, fast = unchanged
    mask = optimised[2]
    wide = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, cross_attention_dim=32,
        caption_channels=12,
    ).eval()  # fmt: skip
    assert set(mc.block_names(wide)) == set(mask.blocks)
    args, kwargs = architecture("pixart").inputs(1, 500, 0)
    theirs = mc.trace(fast.original, *args, **kwargs)
    own = mc.Mask(
        np.ones((1, len(theirs.names)), dtype=bool), blocks=theirs.names, timesteps=[1.0], denoiser=theirs.denoiser, block_hash=theirs.block_hash
    )  # fmt: skip
    with pytest.raises(
        mc.MaskError,
        match="made for another PixArtTransformer2DModel: its blocks have the same names and other parameter shapes",
    ):
        mc.optimize(wide, own)
    with pytest.raises(mc.MaskError, match="made for a PixArtTransformer2DModel, this denoiser is a DiTTransformer2DModel"):
        mc.optimize(architecture("dit").model, own)
    with pytest.raises(mc.MaskError, match="names block 'nowhere'"):
        fast.set_mask(mc.Mask.full(["nowhere"], [1.0]))
    fast.set_mask(own)
    fast.set_mask(mask)


def call(model, **changes):
    args, kwargs = architecture("pixart").inputs(2, 999.0, 0)
    given = {"hidden_states": args[0], **kwargs, **changes}
    return model(**{name: value for name, value in given.items() if value is not ...})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sparkle": 1}, TypeError, r"PixArtTransformer2DModel\.forward\(.*got an unexpected keyword argument 'sparkle'"),
        ({"hidden_states": ...}, TypeError, r"PixArtTransformer2DModel\.forward\(.*missing a required argument: 'hidden_states'"),
        ({"timestep": ...}, ValueError, "called without a tensor or number for 'timestep'"),
        ({"timestep": torch.zeros(0)}, ValueError, "called with an empty tensor for its timestep"),
        (
            {"encoder_hidden_states": torch.randn(2, 6, 12, device="meta")}, RuntimeError,
            r"PixArtTransformer2DModel \(weights float32 on cpu\) does not run on these inputs \(.*float32\[2, 6, 12\] on meta",
        ),
        ({"encoder_hidden_states": torch.randn(2, 6, 13)}, RuntimeError, r"does not run on these inputs .*float32\[2, 6, 13\] on cpu"),
        ({"hidden_states": torch.randn(2, 4, 8, 8).double()}, RuntimeError, r"weights float32 on cpu.*does not run on these inputs .*float64\[2, 4, 8, 8\]"),
        ({"hidden_states": torch.randn(2, 4, 8, 8, requires_grad=True)}, ValueError, "computes no gradients"),
        ({"cross_attention_kwargs": {"scale": object}}, TypeError, "pass tensors, numbers, strings"),
    ],
)  # fmt: skip
def test_wrong_calls(unchanged, changes, error, message):
    if "cross_attention_kwargs" in changes:
        changes = {"cross_attention_kwargs": {"scale": {1, 2}}}
    with torch.set_grad_enabled("gradients" in message), pytest.raises(error, match=message) as raised:
        call(unchanged[1], **changes)
    assert "\n" not in str(raised.value)


def test_a_new_keyword_is_another_capture():
    """It may take the denoiser another way, and changes no result of the calls without it."""
    model = architecture("pixart").model
    fast = mc.optimize(model, mc.Mask.full(["transformer_blocks.0.attn1"], [999.0]), backend="eager")
    with torch.no_grad():
        assert torch.equal(call(fast)[0], call(model)[0])
        assert torch.equal(call(fast, encoder_attention_mask=torch.ones(2, 6))[0], call(model)[0])
        assert call(fast, return_dict=True).sample.shape == (2, 8, 8, 8)
        assert torch.equal(call(fast)[0], call(model)[0])
    assert len(fast.report().signatures) == 3


def test_a_run_of_no_steps(unchanged, optimised):
    """The denoiser is never called; the pipeline returns its noise, or refuses, as it does without."""
    pipe, fast = unchanged
    calls = fast.report().calls
    ours = optimised[1](pipe, num_inference_steps=0)
    assert fast.report().calls == calls
    pipe.transformer = fast.original
    assert torch.equal(optimised[1](pipe, num_inference_steps=0), ours)
    pipe.transformer = fast
    with pytest.raises(mc.MaskError, match="at least one timestep"):
        optimised[2].resample([])
    with pytest.raises(mc.MaskError, match="at least one timestep"):
        mc.Mask.full(optimised[2].blocks, [])
    with pytest.raises(ValueError, match=r"sample\(0\) never called the denoiser"):
        mc.learn(fast.original, lambda seed: optimised[1](pipe, num_inference_steps=0), 0.5, progress=False)


def test_a_size_that_the_denoiser_does_not_take(unchanged):
    """Each size has a capture of its own; one that the denoiser itself refuses is refused in one sentence."""
    _, fast = unchanged
    with pytest.raises(RuntimeError, match=r"does not run on these inputs \(.*float32\[2, 4, 1, 1\]"):
        call(fast, hidden_states=torch.randn(2, 4, 1, 1))
    with torch.no_grad():
        for size in (10, 12):
            sample = torch.randn(2, 4, size, size)
            assert torch.equal(call(fast, hidden_states=sample)[0], call(fast.original, hidden_states=sample)[0])
            fast._captures.popitem()
    fast.reset()  # the run that these calls began


def test_an_adapter_added_after_capture_is_seen():
    peft = pytest.importorskip("peft")
    case = architecture("flux")
    model = copy.deepcopy(case.model)
    args, kwargs = case.inputs(2, 0.901, 0)
    fast = mc.optimize(model, mc.Mask.full(["transformer_blocks.0.attn"], [0.901]), backend="eager")
    before = fast(*args, **kwargs)[0]
    fast.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        after = fast(*args, **kwargs)[0]
        assert torch.equal(after, model(*args, **kwargs)[0])
    assert not torch.equal(after, before)
    assert fast.report().recaptures == 1
    assert "CAPTURED AGAIN 1 times" in str(fast.report())
