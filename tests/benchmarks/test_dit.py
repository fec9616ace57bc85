"""The reference layout of DiT: the official state dict's names and shapes, and diffusers' model as the other truth."""

from __future__ import annotations

import re

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import Attention, Mlp, PatchEmbed

import maskcompile as mc
from benchmarks import dit
from tests.executor import Executor

SMALL = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
WIDTH = 1152
#: of DiT-XL-2-256x256.pt, by github.com/facebookresearch/DiT's models.py at input_size 32; one of its 28 blocks
BLOCK = {
    "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,), "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
    "mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,), "mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,),
    "adaLN_modulation.1.weight": (6 * WIDTH, WIDTH), "adaLN_modulation.1.bias": (6 * WIDTH,),
}  # fmt: skip
OFFICIAL = {
    "pos_embed": (1, 256, WIDTH), "x_embedder.proj.weight": (WIDTH, 4, 2, 2), "x_embedder.proj.bias": (WIDTH,),
    "t_embedder.mlp.0.weight": (WIDTH, 256), "t_embedder.mlp.0.bias": (WIDTH,),
    "t_embedder.mlp.2.weight": (WIDTH, WIDTH), "t_embedder.mlp.2.bias": (WIDTH,),
    "y_embedder.embedding_table.weight": (1001, WIDTH),
    **{f"blocks.{i}.{name}": shape for i in range(28) for name, shape in BLOCK.items()},
    "final_layer.linear.weight": (32, WIDTH), "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH), "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
}  # fmt: skip


def small(seed=0, **settings):
    torch.manual_seed(seed)
    model = dit.DiT(**SMALL, **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor([901.0, 500.0, 1.0][:batch]), torch.arange(batch) * 5


def test_the_official_state_dict_loads_by_its_names():
    with torch.device("meta"):
        model = dit.DiT()
        larger = dit.DiT(input_size=64)
        official = {name: torch.empty(shape) for name, shape in OFFICIAL.items()}
    model.load_state_dict(official, strict=True, assign=True)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == OFFICIAL
    assert sum(value.numel() for value in official.values()) == 675_129_632  # "675M" in the paper
    assert {n for n, v in larger.state_dict().items() if tuple(v.shape) != OFFICIAL[n]} == {"pos_embed"}
    assert dit.settings_of(official) == {
        "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": WIDTH, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0,
        "num_classes": 1000, "learn_sigma": True,
    }  # fmt: skip
    assert isinstance(model.x_embedder, PatchEmbed)
    assert all(isinstance(b.attn, Attention) and isinstance(b.mlp, Mlp) for b in model.blocks)


def theirs(weights, downscale_freq_shift):
    """diffusers' model with our weights."""
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=3, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
        num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    model.load_state_dict(dit.to_diffusers(weights), strict=True)
    for module in model.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = downscale_freq_shift
    return model


@pytest.mark.parametrize("shift", [0, 1])
def test_equal_to_diffusers_at_converted_weights(shift):
    """shift 0 is the reference code's time embedding; 1 is diffusers' own, which nothing was changed in then."""
    model = small(frequency_shift=shift)
    other = theirs(model.state_dict(), shift)
    x, t, y = inputs()
    with torch.no_grad():
        ours, expected = model(x, t, y), other(x, timestep=t, class_labels=y).sample
        wrong = theirs(model.state_dict(), 1 - shift)(x, timestep=t, class_labels=y).sample
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 1e-5
    assert (ours - wrong).abs().max() > 1e-3  # the embeddings do differ
    back = dit.from_diffusers(other.state_dict(), 8)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_position_embedding_is_the_published_formula():
    """Column first, then row, each sines then cosines, at frequencies 10000^(-i / (width / 4))."""
    found = dit.position_embedding(24, 3)[0]
    for row in range(3):
        for column in range(3):
            expected = [f(p / 10000 ** (i / 6)) for p in (column, row) for f in (np.sin, np.cos) for i in range(6)]
            assert np.allclose(found[3 * row + column], expected, atol=1e-6)


def test_guidance():
    model = small()
    x, t, y = inputs(batch=2)
    pair, times, labels = torch.cat([x, torch.zeros_like(x)]), torch.cat([t, t]), torch.cat([y, torch.tensor([10, 10])])
    with torch.no_grad():
        found = model.forward_with_cfg(pair, times, labels, 4.0)
        conditional, unconditional = model(x, t, y), model(x, t, torch.tensor([10, 10]))
    expected = unconditional + 4.0 * (conditional - unconditional)
    assert torch.allclose(found[:2, :3], expected[:, :3], atol=1e-5)
    assert torch.equal(found[:2, :3], found[2:, :3])
    assert torch.allclose(found[:, 3:], torch.cat([conditional, unconditional])[:, 3:], atol=1e-6)


def test_checkpoints(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save({"ema": model.state_dict(), "opt": {"lr": 1e-4}}, tmp_path / "train.pt")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for name in ("plain.pt", "train.pt", "plain.safetensors"):
        loaded = dit.load(tmp_path / name, heads=2)
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(*inputs()), model(*inputs()))


def _no_checkpoint(path, weights):
    path.write_text("a picture, perhaps")


def _no_tensors(path, weights):
    torch.save([1, 2, 3], path)


def _an_object(path, weights):
    torch.save(dit.LabelEmbedder(2, 2), path)


def _other_layout(path, weights):
    torch.save(dit.to_diffusers(weights), path)


def _one_missing(path, weights):
    torch.save({n: v for n, v in weights.items() if n != "blocks.1.attn.qkv.bias"}, path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_no_checkpoint, "no file of tensors"),
        (_no_tensors, "a list that is no state dict"),
        (_an_object, "no file of tensors"),
        (_other_layout, "no 'pos_embed'"),
        (_one_missing, "blocks.1.attn.qkv.bias"),
    ],
)
def test_wrong_files(tmp_path, write, said):
    write(tmp_path / "x.pt", small().state_dict())
    with pytest.raises(ValueError, match=re.escape(said)):
        dit.load(tmp_path / "x.pt", heads=2)


def test_missing_files_and_heads(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        dit.load(tmp_path / "absent.pt")
    save_file(small().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="how many attention heads"):
        dit.load(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        dit.load(tmp_path / "y.safetensors", heads=2)


def test_masks():
    """All ones is eager PyTorch, bit for bit; a random mask is the executor."""
    model, timesteps = small(), (901, 701, 501, 301, 101)
    calls = [(inputs(i)[0], torch.full((3,), t), inputs()[2]) for i, t in enumerate(timesteps)]
    program = mc.trace(model, *calls[0])
    assert program.names == tuple(f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp"))
    assert {b.kind for b in program.blocks if b.name.endswith("attn")} == {"attention"}
    fast = mc.optimize(model, mc.Mask.full(program.names, timesteps), backend="eager")
    with torch.no_grad():
        assert all(torch.equal(fast(*call), model(*call)) for call in calls)
    compute = np.random.default_rng(3).random((5, 6)) < 0.5
    fast.set_mask(mc.Mask(compute, blocks=program.names, timesteps=timesteps))
    compute[0] = True
    executor = Executor(model, program.names, compute)
    changed = False
    for step, call in enumerate(calls):
        with torch.no_grad():
            masked = fast(*call)
            assert torch.equal(masked, executor.step(step, *call))
            changed |= not torch.equal(masked, model(*call))
    assert changed
