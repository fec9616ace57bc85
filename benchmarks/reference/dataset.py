"""The pictures that the reference denoisers are trained on: Noto emoji at 32 x 32.

Source: the npm package ``emoji-datasource-google`` (MIT), whose pictures are Google's Noto emoji, Apache License 2.0.
``npm pack`` fetches it; nothing else is downloaded.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
SIZE = 32

#: class index -> (name, emoji subcategories). A subcategory that ends in "-" is a prefix.
CLASSES: list[tuple[str, tuple[str, ...]]] = [
    ("face", ("face-",)),
    ("heart", ("heart",)),
    ("flag", ("country-flag",)),
    ("animal", ("animal-mammal", "cat-face", "monkey-face")),
    ("fruit", ("food-fruit", "food-vegetable")),
    ("clock", ("time",)),
]


def class_of(subcategory: str) -> int | None:
    """The class index of an emoji subcategory, or None when it is not trained on."""
    for index, (_, patterns) in enumerate(CLASSES):
        if any(subcategory == p or (p.endswith("-") and subcategory.startswith(p)) for p in patterns):
            return index
    return None


def build(path: Path) -> None:
    """Fetch the npm package and write ``path``: an npz of ``pictures`` uint8 [N, 32, 32, 3] and ``labels`` int64 [N]."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is needed to fetch the training pictures (package emoji-datasource-google).")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        pictures, labels = read_package(archive)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial.npz")
    np.savez_compressed(partial, pictures=pictures, labels=labels)
    partial.replace(path)


def read_package(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every emoji of ``CLASSES`` in the npm archive, composited on white and scaled to 32 x 32."""
    with tarfile.open(archive) as package:

        def content(name: str) -> bytes:
            member = package.extractfile(f"package/{name}")
            assert member is not None
            return member.read()

        pictures, labels = [], []
        for emoji in json.loads(content("emoji.json")):
            label = class_of(emoji["subcategory"])
            if label is None or not emoji["has_img_google"]:
                continue
            image = Image.open(io.BytesIO(content(f"img/google/64/{emoji['image']}"))).convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            flat = Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            pictures.append(np.asarray(flat))
            labels.append(label)
    return np.stack(pictures), np.asarray(labels, dtype=np.int64)


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(pictures uint8 [N, 32, 32, 3], labels int64 [N]), fetched and written to ``path`` when it does not exist."""
    if not path.exists():
        build(path)
    with np.load(path) as data:
        return data["pictures"], data["labels"]
