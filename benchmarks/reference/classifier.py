"""A classifier whose features stand in for Inception's: ``python -m benchmarks.reference.classifier``.

It learns to tell all 550 emoji apart under shifts, changes of colour and noise. The 64 features before its last layer are what
the Frechet distance of ``benchmarks.quality`` compares; distances in them can be compared with each other and with nothing
else. About a minute on two cores.
"""

from __future__ import annotations

import itertools

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.reference.dataset import load
from benchmarks.reference.train import CACHE, HERE

FEATURES = 64
WEIGHTS = HERE / "classifier.safetensors"


class Features(nn.Module):
    """uint8 pictures [N, 3, 32, 32] -> float features [N, 64]."""

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.layers.extend([nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()])
            self.layers.extend([nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()])
        self.layers.extend([nn.Flatten(), nn.Linear(96 * 4 * 4, FEATURES), nn.LayerNorm(FEATURES)])

    def forward(self, pictures: Tensor) -> Tensor:
        assert pictures.dtype == torch.uint8 or pictures.max() > 1, "pictures are in 0..255"
        features: Tensor = self.layers(pictures.float() / 127.5 - 1)
        return features


def augment(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, 32, 32] moved by up to two pixels, with contrast, brightness and noise changed; a float tensor in 0..255."""
    count = len(pictures)
    padded = nn.functional.pad(pictures.float(), (2, 2, 2, 2), value=255.0)
    moves = torch.randint(0, 5, (count, 2)).tolist()
    moved = torch.stack([p[:, y : y + 32, x : x + 32] for p, (y, x) in zip(padded, moves, strict=True)])
    contrast, brightness = 0.8 + 0.4 * torch.rand(count, 1, 1, 1), 20 * torch.randn(count, 3, 1, 1)
    noise = torch.rand(count, 1, 1, 1) * 20 * torch.randn_like(moved)
    return ((moved - 128) * contrast + 128 + brightness + noise).clamp(0, 255)


def train(pictures: Tensor, steps: int = 1500, batch: int = 64) -> tuple[Features, float]:
    """pictures: uint8 [N, 3, 32, 32], a class each. Returns the features and the accuracy on augmented pictures."""
    torch.manual_seed(0)
    features, head = Features(), nn.Linear(FEATURES, len(pictures))
    parameters = [*features.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier", disable=None):
        index = torch.randint(0, len(pictures), (batch,))
        loss = nn.functional.cross_entropy(head(features(augment(pictures[index]))), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        correct = head(features(augment(pictures))).argmax(1) == torch.arange(len(pictures))
    return features.eval(), correct.float().mean().item()


def load_features() -> Features:
    """The features trained by the recipe, from the repository."""
    features = Features()
    features.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return features.eval()


def main() -> None:
    pictures, _ = load(CACHE / "emoji.npz")
    features, accuracy = train(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    save_file({name: value.half().contiguous() for name, value in features.state_dict().items()}, WEIGHTS)
    print(f"{accuracy:.1%} of {len(pictures)} augmented pictures told apart -> {WEIGHTS}")


if __name__ == "__main__":
    main()
