"""Train a reference denoiser from scratch: ``python -m benchmarks.reference.train unet`` (or ``dit``).

``unet``: a DDPM-style UNet2DModel without classes, on the face emoji.
``dit``: a class-conditional DiTTransformer2DModel, on six kinds of emoji, classes drawn evenly.

Both predict v (Salimans & Ho 2022, arXiv 2202.00512, appendix D) under the cosine schedule (Nichol & Dhariwal 2021,
arXiv 2102.09672): at 32 x 32 and this little training, predicting the noise leaves the white backgrounds tinted.
bf16 autocast, AdamW, EMA of the weights. A checkpoint is written every few minutes and the same command resumes from it. At the
end the EMA weights are exported as fp16 safetensors with diffusers' own ``save_pretrained``, next to this file. Training steps
are counted, not timed, so that a run on another machine does the same work.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from tqdm import tqdm

from benchmarks.reference.dataset import CLASSES, SIZE, load

HERE = Path(__file__).parent
CACHE = HERE / "cache"
EMA_DECAY = 0.999
SECONDS_PER_CHECKPOINT = 240
#: learning rate, batch and optimiser steps of each denoiser
RECIPE = {"unet": (6e-4, 32, 2300), "dit": (5e-4, 32, 5200)}


def build_unet() -> UNet2DModel:
    """2.6M parameters; self-attention at 8 x 8 only, heads of 32 channels."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def build_dit() -> DiTTransformer2DModel:
    """6.1M parameters: 8 layers of width 192 over 4 x 4 patches.

    diffusers drops a tenth of the labels in training, but in every layer by itself, so that "no class" in all layers at once
    is never seen: sample without guidance.
    """
    return DiTTransformer2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        patch_size=4,
        num_layers=8,
        num_attention_heads=6,
        attention_head_dim=32,
        num_embeds_ada_norm=len(CLASSES),
    )


def build(name: str) -> UNet2DModel | DiTTransformer2DModel:
    return build_unet() if name == "unet" else build_dit()


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=True
    )


def training_pictures(name: str, path: Path = CACHE / "emoji.npz") -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures float32 [N, 3, 32, 32] in -1..1, labels int64 [N]); faces only for the UNet."""
    pictures, labels = load(path)
    if name == "unet":
        pictures, labels = pictures[labels == 0], labels[labels == 0]
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return scaled, torch.from_numpy(np.asarray(labels))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine to 2% of the peak."""
    decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / 200) * decay


def train(name: str, device: str, steps: int, pictures: torch.Tensor, labels: torch.Tensor, cache: Path = CACHE) -> Path:
    """Train the denoiser ``name`` for ``steps`` optimiser steps, from its checkpoint in ``cache`` where there is one.

    pictures: float32 [N, 3, 32, 32] in -1..1. labels: int64 [N]. Returns the checkpoint, which is written every few minutes,
    at the end, and on Ctrl-C; a resumed training goes on as if it had not stopped.
    """
    peak, batch, _ = RECIPE[name]
    torch.manual_seed(0)
    denoiser = build(name).to(device).train()
    if name == "unet":
        denoiser = denoiser.to(memory_format=torch.channels_last)
    scheduler = build_scheduler()
    # Classes are drawn evenly: hearts are 25 pictures, flags 259.
    weights = (1.0 / torch.bincount(labels).float())[labels]
    pictures, labels = pictures.to(device), labels.to(device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=peak, weight_decay=0.0, betas=(0.9, 0.99))
    ema = {k: v.detach().clone() for k, v in denoiser.state_dict().items()}
    step, minutes = 0, 0.0

    checkpoint = cache / f"{name}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        denoiser.load_state_dict(state["denoiser"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, minutes = state["ema"], state["step"], state["minutes"]

    def save() -> None:
        state = {"denoiser": denoiser.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step}
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "minutes": minutes + (time.perf_counter() - began) / 60}, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    began = saved = time.perf_counter()
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=10)
    try:
        while step < steps:
            # Seeded anew at each step, so that a resumed run sees the pictures and noise that an uninterrupted one would.
            torch.manual_seed(step)
            index = torch.multinomial(weights, batch, replacement=True)
            noise = torch.randn(batch, 3, SIZE, SIZE).to(device)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,)).to(device)
            clean = pictures[index.to(device)]
            noisy, target = scheduler.add_noise(clean, noise, timesteps), scheduler.get_velocity(clean, noise, timesteps)
            extra = {} if name == "unet" else {"class_labels": labels[index.to(device)]}
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                predicted = denoiser(noisy, timesteps, return_dict=False, **extra)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            optimizer.step()
            follow(ema, denoiser, min(EMA_DECAY, (1 + step) / (10 + step)))
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if time.perf_counter() - saved > SECONDS_PER_CHECKPOINT:
                save()
                saved = time.perf_counter()
    finally:
        save()
    return checkpoint


@torch.no_grad()
def follow(ema: dict[str, torch.Tensor], denoiser: torch.nn.Module, decay: float) -> None:
    """Move the exponential moving average of the weights."""
    state = denoiser.state_dict()
    floating = [key for key, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[k] for k in floating], [state[k] for k in floating], 1 - decay)


def export(name: str, checkpoint: Path, folder: Path) -> None:
    """Write the EMA weights of a checkpoint as a diffusers folder (fp16 safetensors) with its scheduler."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    denoiser = build(name)
    denoiser.load_state_dict(state["ema"])
    denoiser.eval().half().save_pretrained(folder)
    build_scheduler().save_pretrained(folder / "scheduler")
    print(f"{name}: exported after {state['step']} steps, {state['minutes']:.0f} minutes -> {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("denoiser", choices=sorted(RECIPE))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps; default: the recipe's")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pictures, labels = training_pictures(options.denoiser)
    steps = options.steps or RECIPE[options.denoiser][2]
    checkpoint = train(options.denoiser, options.device, steps, pictures, labels)
    export(options.denoiser, checkpoint, HERE / options.denoiser)


if __name__ == "__main__":
    main()
