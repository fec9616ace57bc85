"""A row of the paper with a real checkpoint: ``python -m benchmarks.paper ROW --weights FOLDER --images 50000 --real FOLDER``.

Loads the checkpoint from the user's disk (see ``benchmarks.checkpoints`` for what each row needs; nothing is fetched), learns a
mask, samples with it and without, and prints the paper's columns: MACs, what the mask keeps of them, the measured speed-up, and
the Frechet distance to real pictures.

Goes on where it was stopped, to the same mask and pictures: learning from its checkpoint, sampling batch by batch, each picture
from noise of its own. Under ``accelerate launch`` or torchrun the processes learn together and divide the pictures; the first
measures. Everything is kept in ``--out``/ROW: ``mask.json``, the pictures ``original/000000.png`` and ``masked/000000.png``,
``result.json`` and ``result.md``.

The speed-up is of whole sampling runs without the decoder, the original and the masked denoiser compiled alike, with CUDA
graphs on CUDA, and run in turn.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import maskcompile as mc
from benchmarks import frechet, rows
from benchmarks.checkpoints import Request, Sampler, default_weights, find_row, load, names
from benchmarks.timing import hardware, interleaved, ratio, ratio_spread, use
from maskcompile.files import write_whole
from maskcompile.learning.processes import Processes, launched
from maskcompile.mask import steps_of

#: index of the first picture whose noise is learned from: no sampling comes so far
LEARNED_FROM = 10**9
#: from one of these pictures to the next; prime, so that classes and prompts, which go by the index, are spread and all come
STRIDE = 617
VARIANTS = ("original", "masked")


def given_mask(sampler: Sampler, path: Path | None) -> mc.Mask | None:
    """The mask of a file. Raises ValueError where it is for other timesteps, whose run would reuse next to nothing."""
    if path is None:
        return None
    mask, steps = mc.Mask.load(path), steps_of(sampler.scheduler.timesteps)
    if mask.timesteps != steps:
        raise ValueError(
            f"{path} is a mask for {mask.steps} timesteps, {mask.timesteps[0]:g} to {mask.timesteps[-1]:g}; this run has "
            f"{len(steps)}, {steps[0]:g} to {steps[-1]:g}. Give --steps, or mask.resample it."
        )
    return mask


def learned(sampler: Sampler, given: mc.Mask | None, options: argparse.Namespace, processes: Processes) -> mc.Mask:
    """The row's mask: the one that is given, or the one in the folder, or a new one."""
    path = options.folder / "mask.json"
    if given is not None:
        return given
    if processes.first(path.exists()):
        return mc.Mask.load(path)
    count = options.learn_images

    def sample(seed: int) -> Tensor:
        return sampler.draw(sampler.denoiser, learned_from(seed, count), False)

    method: Any = mc.Paper() if options.method == "paper" else mc.Search(passes=options.passes)
    checkpoint = options.folder / "mask.checkpoint"
    mask = mc.learn(
        sampler.denoiser, sample, options.budget, method=method, reuse=options.reuse, log_snr=mc.log_snr(sampler.scheduler),
        seeds=options.seeds, checkpoint=checkpoint,
    )  # fmt: skip
    if processes.rank == 0:
        mask.save(path)
        checkpoint.unlink(missing_ok=True)
    return mask


def learned_from(seed: int, count: int) -> list[int]:
    """Indices of the ``count`` pictures of a sampling pass to learn from; no two passes share one."""
    return [LEARNED_FROM + STRIDE * i for i in range(seed * count, (seed + 1) * count)]


def missing_batches(folder: Path, images: int, batch: int) -> list[int]:
    """First indices of the batches of which a picture is missing."""
    there = {path.name for path in folder.glob("*.png")}
    starts = range(0, images, batch)
    return [start for start in starts if any(file_of(i) not in there for i in range(start, min(start + batch, images)))]


def file_of(index: int) -> str:
    return f"{index:06d}.png"


def draw_missing(sampler: Sampler, denoiser: Any, folder: Path, images: int, batch: int, processes: Processes) -> None:
    """Draw this process's share of the pictures that are not in the folder yet. Batches are always whole: one capture."""
    folder.mkdir(exist_ok=True)
    missing = processes.first(missing_batches(folder, images, batch))
    mine = processes.mine(missing)
    for start in tqdm(mine, desc=folder.name, disable=None if processes.rank == 0 else True):
        pictures = sampler.draw(denoiser, range(start, start + batch), True)
        for index, picture in zip(range(start, min(start + batch, images)), pictures, strict=False):
            write_whole(folder / file_of(index), png(picture))


def png(picture: Tensor) -> bytes:
    """A float picture [3, S, S] in 0..1."""
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def compiled_alike(denoiser: nn.Module, mask: mc.Mask, options: argparse.Namespace) -> dict[str, Any]:
    """``VARIANTS``. Inductor's on CUDA are both replayed as CUDA graphs, all else as neither is."""
    graphs = options.backend == "inductor" and options.device.startswith("cuda")
    mode = {"mode": "reduce-overhead"} if graphs else {}
    return {
        "original": torch.compile(denoiser, fullgraph=True, dynamic=False, backend=options.backend, **mode),
        "masked": mc.optimize(denoiser, mask, backend=options.backend, cuda_graphs="auto" if graphs else False),
    }


def costs(fast: mc.OptimizedDenoiser, sampler: Sampler, batch: int) -> dict[str, Any]:
    """Of a denoiser that has run. gmacs: 10^9 multiply-accumulates of a step, mean, of one picture and half of guidance."""
    of_run = fast.report().signatures[-1]
    steps = fast.mask.steps * batch * sampler.calls * 1e9
    return {
        "gmacs": of_run.full_macs / steps, "gmacs_masked": of_run.macs / steps, "share": of_run.share, "graphs": of_run.graphs,
        "cache_mib": of_run.peak_cache_bytes / 2**20,
    }  # fmt: skip


def speed(sampler: Sampler, variants: dict[str, Any], batch: int, repeats: int) -> dict[str, Any]:
    """Whole sampling runs of one batch in turn."""
    indices = range(batch)
    runs: dict[str, Callable[[], Any]] = {
        name: (lambda denoiser=denoiser: sampler.draw(denoiser, indices, False)) for name, denoiser in variants.items()
    }
    times = interleaved(runs, repeats)
    taken = {f"{name}_ms_a_picture": 1000 * timing.median / batch for name, timing in times.items()}
    spread = ratio_spread(times["original"], times["masked"])
    return {"speedup": ratio(times["original"], times["masked"]), "spread": spread, **taken}


def likeness(folder: Path, images: int, size: int) -> float:
    """Median PSNR in dB of the masked pictures to the original ones, of all that both have; infinite for equal ones."""
    pairs = [[folder / variant / file_of(i) for variant in VARIANTS] for i in range(images)]
    ours = frechet.batches([masked for _, masked in pairs], size)
    theirs = frechet.batches([original for original, _ in pairs], size)
    errors = [(a.double() - b.double()).square().flatten(1).mean(1) for a, b in zip(ours, theirs, strict=True)]
    return (10 * torch.log10(255**2 / torch.cat(errors))).median().item()


def distance(folder: Path, images: int, options: argparse.Namespace, size: int) -> float:
    """Frechet distance of the first ``images`` pictures in the folder to the real ones."""
    metric = frechet.metric(options.inception, options.device)
    frechet.see_real(metric, options.real, size)
    frechet.see(metric, [folder / file_of(i) for i in range(images)], real=False, size=size)
    value: float = metric.compute().item()
    return value


def distance_key(variant: str, options: argparse.Namespace) -> str:
    """Of a row of result.json: distances to other pictures than these, or by another network, are never taken for it."""
    against = [frechet.fingerprint(path) if path is not None else "-" for path in (options.real, options.inception)]
    return f"distance {variant} {options.images} {' '.join(against)}"


def check_real(options: argparse.Namespace) -> None:
    """Raise now what ``distance`` would raise after hours of sampling."""
    if options.real is None:
        if options.inception is not None:
            raise ValueError("--inception needs --real: pictures or statistics to measure the distance to.")
        return
    if options.real.is_dir():
        frechet.metric(options.inception, "cpu")
        frechet.pictures_in(options.real)
    else:
        frechet.see_real(frechet.metric(options.inception, "cpu"), options.real, 0)


def digest(part: nn.Module | Tensor) -> str:
    """Tells weights apart, and what is configured beside them: a DiT's does not say its heads, a decoder's not its scale."""
    tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part}
    found = sha256(json.dumps(_configuration(getattr(part, "config", {})), sort_keys=True).encode())
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _configuration(config: Any) -> dict[str, Any]:
    """A configuration of diffusers or transformers as JSON has it, without what only says where it came from ("_...")."""
    known = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    plain: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return {name: value for name, value in plain.items() if not name.startswith("_")}


def settings(sampler: Sampler, options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a run to go on from this folder."""
    row = sampler.row
    given = Path(options.mask).read_bytes() if options.mask is not None else None
    learning: dict[str, Any] = {"mask": sha256(given).hexdigest()[:16]} if given is not None else {
        "budget": options.budget, "method": options.method, "reuse": options.reuse, "seeds": list(options.seeds),
        "passes": options.passes, "learned from": options.learn_images,
    }  # fmt: skip
    return {
        "row": row.name, "weights": digest(sampler.denoiser), "steps": row.steps, "guidance": row.guidance, "eta": row.eta,
        "beside": {name: digest(part) for name, part in sampler.beside.items()}, "heads": options.heads,
        "sampler": {"name": type(sampler.scheduler).__name__, **_configuration(sampler.scheduler.config)},
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "batch": options.batch, "dtype": options.dtype, "backend": options.backend,
        "prompts": sha256("\n".join(options.prompts).encode()).hexdigest()[:16], "learning": learning,
    }  # fmt: skip


def run(options: argparse.Namespace, processes: Processes) -> str | None:
    """The report, in the first process; None in the others."""
    row = find_row(options.row)
    row = replace(row, steps=options.steps or row.steps)
    if options.guidance is not None:
        if row.guidance is None:
            raise ValueError(f"the row {row.name} has no guidance.")
        row = replace(row, guidance=options.guidance if options.guidance > 1 else None)
    weights = options.weights or default_weights(row)
    if weights is None:
        raise ValueError(f"the row {row.name} needs --weights, a folder with its checkpoint: {row.configuration}.")
    request = Request(row, weights, options.device, getattr(torch, options.dtype), options.prompts, options.heads)
    check_real(options)
    sampler = load(request)
    given = given_mask(sampler, options.mask)
    options.folder = options.out / row.name
    path = options.folder / "result.json"
    if processes.rank == 0:
        options.folder.mkdir(parents=True, exist_ok=True)
        if options.fresh:
            _clear(options.folder)
        done = rows.opened(path, settings(sampler, options), options.fresh)
    processes.gather({})  # nobody goes on before the folder is as it should be
    mask = learned(sampler, given, options, processes)
    variants = compiled_alike(sampler.denoiser, mask, options)
    fast = variants["masked"]
    for name in VARIANTS if options.original else ("masked",):
        draw_missing(sampler, variants[name], options.folder / name, options.images, options.batch, processes)
    processes.gather({})
    if processes.rank != 0:
        return None
    with Image.open(options.folder / "masked" / file_of(0)) as first:
        size = first.width
    if (key := f"speed {hardware(device=options.device)}") not in done:
        taken = speed(sampler, variants, options.batch, options.repeats)
        rows.add(
            path,
            {
                "key": key,
                "hardware": hardware(device=options.device),
                "repeats": options.repeats,
                **taken,
                **costs(fast, sampler, options.batch),
            },
        )
    for name in VARIANTS if options.original else ("masked",):
        if options.real is not None and (key := distance_key(name, options)) not in done:
            found = distance(options.folder / name, options.images, options, size)
            rows.add(path, {"key": key, "variant": name, "real": str(options.real), "distance": found})
    if options.original and (key := f"likeness {options.images}") not in done:
        rows.add(path, {"key": key, "psnr": likeness(options.folder, options.images, size)})
    text = report(sampler, mask, options, json.loads(path.read_text())["rows"], size)
    write_whole(options.folder / "result.md", text)
    return text


def _clear(folder: Path) -> None:
    """What an earlier run left."""
    for name in VARIANTS:
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in ("mask.json", "mask.checkpoint"):
        (folder / name).unlink(missing_ok=True)


def report(sampler: Sampler, mask: mc.Mask, options: argparse.Namespace, found: list[dict[str, Any]], size: int) -> str:
    """result.md. found: the rows of result.json."""
    row, known = sampler.row, {r["key"]: r for r in found}
    timed = known[f"speed {hardware(device=options.device)}"]
    distances = [known.get(distance_key(name, options), {}).get("distance") for name in VARIANTS]
    psnr = known.get(f"likeness {options.images}", {}).get("psnr")
    calls = mask.steps * sampler.calls
    alike = "-" if psnr is None else f"{psnr:.1f}"
    guidance = f", guidance {row.guidance:g}" if row.guidance else ""
    method = mask.provenance.get("method") or "given"
    said = ["-" if d is None else f"{d:.2f}" for d in distances]
    head = "| row | sampler | mask | MACs a step, G: original / masked, mean | MACs a run, G: original / masked | MACs kept "
    head += "| speed-up "
    head += f"| {frechet.name(options.inception)}: original / masked | PSNR dB, median |"
    scheduler = type(sampler.scheduler).__name__.removesuffix("Scheduler")
    line = (
        f"| {row.title} | {scheduler}, {mask.steps} steps{guidance} | {method}, {', '.join(sorted(set(mask.reuse)))} "
        f"| {timed['gmacs']:.4g} / {timed['gmacs_masked']:.4g} "
        f"| {timed['gmacs'] * calls:.4g} / {timed['gmacs_masked'] * calls:.4g} | {timed['share']:.1%} "
        f"| {timed['speedup']:.2f}x (spread {timed['spread']:.0%}) | {' / '.join(said)} | {alike} |"
    )
    original, masked = timed["original_ms_a_picture"], timed["masked_ms_a_picture"]
    caption = (
        f"{options.images} pictures of {size} x {size}, batch {options.batch}, {options.dtype}, backend {options.backend}; "
        f"{original:.4g} and {masked:.4g} ms a picture without the decoder, medians of {timed['repeats']} interleaved runs "
        f"(spread: of the speed-up); "
        f"{timed['graphs']} graphs, cache {timed['cache_mib']:.1f} MiB; {timed['hardware']}. MACs are of one picture"
        f"{', a step of one half of guidance, a run of both' if row.guidance else ''}."
    )
    return f"{head}\n|{'---|' * 9}\n{line}\n\n{caption}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. What the user can mend is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=names())
    parser.add_argument("--weights", type=Path, help="folder of the checkpoint; the reference denoisers need none")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the MACs to keep")
    parser.add_argument("--method", choices=("search", "paper"), default="search")
    parser.add_argument("--passes", type=float, default=mc.Search().passes, help="work of the search, in sampling passes")
    parser.add_argument("--reuse", choices=("auto", "hold", "linear"), default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="sampling passes to learn from")
    parser.add_argument("--learn-images", type=int, default=8, help="pictures in each of them")
    parser.add_argument("--mask", type=Path, help="use this mask instead of learning one")
    parser.add_argument("--steps", type=int, help="instead of the row's")
    parser.add_argument("--guidance", type=float, help="instead of the row's; 1 is none")
    parser.add_argument("--heads", type=int, help="attention heads of a DiT of another width than the published ones")
    parser.add_argument("--prompts", type=Path, help="file of prompts, one a line")
    parser.add_argument("--real", type=Path, help="real pictures in a folder, or their statistics (mu, sigma) in an .npz")
    parser.add_argument("--inception", type=Path, help="torch-fidelity's InceptionV3 weights; else the bundled classifier")
    parser.add_argument("--original", action=argparse.BooleanOptionalAction, default=True, help="sample without the mask too")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="start over: delete the mask and pictures of an earlier run")
    parser.add_argument("--out", type=Path, default=Path("paper"))
    options = parser.parse_args(arguments)
    if min(options.images, options.batch, options.repeats) < 1 or options.images < 2:
        parser.error("--images is at least 2, --batch and --repeats at least 1.")
    warnings.filterwarnings("ignore", module="torch")
    try:
        lines = options.prompts.read_text().splitlines() if options.prompts else []
        options.prompts = tuple(line.strip() for line in lines if line.strip())
        use(options.device)
        with launched() as processes:
            text = run(options, processes)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"benchmarks.paper: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if text is not None:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
