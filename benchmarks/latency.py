"""Speed beside ``torch.compile``, as ratios within one run: ``python -m benchmarks.latency``.

For each denoiser: eager, ``torch.compile`` of the original, the all-ones mask, and published masks under both reuse rules, put
together from compiled regions, all compiled alike; two of the masks also as whole graphs, under backend "eager", and in further
modes of ``torch.compile`` beside the original in that mode (CUDA graphs in the rows of "reduce-overhead" alone, on a GPU). The
denoiser calls of one sampling run each; on a CPU the variants take turns every few steps. For the DiT also diffusers'
TaylorSeer hook, which cannot be compiled whole and runs as it is. The realised share is (speed-up over the compiled original)
/ (MACs before / MACs after): 1 means that every MAC the mask removes is time saved, less that something was added. What the
linear rule costs is measured step against step: one that extrapolates beside the same one that holds, each after a full step,
as a share of a step of the compiled original.

Writes ``latency.json`` and ``latency.md``, a table for each machine and setting; what is measured again is replaced.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import maskcompile as mc
from benchmarks.cases import BATCH, Case, calls, case
from benchmarks.masks import SCHEDULES, Choice, choices
from benchmarks.reference import load
from benchmarks.rivals import BLOCKS, taylorseer_hook
from benchmarks.timing import difference, hardware, in_parts, interleaved, ratio, ratio_spread, use
from maskcompile.files import write_whole

RESULTS = Path(__file__).parent / "results"

#: turns of a variant within a round on a CPU; a GPU would be idle at the end of each
PARTS = 10
#: further modes of ``torch.compile``, and whether ours records CUDA graphs then; the last on a GPU only
MODES = {"max-autotune-no-cudagraphs": False, "reduce-overhead": True}


def measure(of: Case, repeats: int, backend: str) -> list[dict[str, Any]]:
    """A row for every variant."""
    args, kwargs = of.calls[0]
    on_gpu, parts = of.start.is_cuda, parts_of(of)
    program = mc.trace(of.denoiser, *args, **kwargs)
    chosen = choices(of.name)
    masks = {"all ones": mc.Mask.full(program.names, of.timesteps)}
    masks |= {f"{choice.label}, {choice.reuse}": choice.mask(program, of) for choice in chosen}
    few = ("all ones", next(f"{choice.label}, linear" for choice in chosen if choice.reuse == "linear"))

    def compiled(**options: Any) -> Callable[..., Any]:
        return torch.compile(of.denoiser, fullgraph=True, dynamic=False, backend=backend, **options)

    def ours(mask: mc.Mask, **options: Any) -> mc.OptimizedDenoiser:
        return mc.optimize(of.denoiser, mask, **{"backend": backend, "cuda_graphs": False, **options})

    variants = {"eager": of.denoiser, "torch.compile": compiled()} | {label: ours(mask) for label, mask in masks.items()}
    beside = dict.fromkeys(variants, "torch.compile")
    shown = dict(masks)
    further: dict[str, dict[str, Any]] = {"whole graphs": {"regions": False}, "backend eager": {"backend": "eager"}}
    for mode in [mode for mode, replays in MODES.items() if backend == "inductor" and (on_gpu or not replays)]:
        further[mode] = {"mode": mode, "cuda_graphs": MODES[mode]}
        variants[f"torch.compile, {mode}"] = compiled(mode=mode)
        beside[f"torch.compile, {mode}"] = "torch.compile"
    for (name, options), label in product(further.items(), few):
        named = f"{label}, {name}"
        variants[named], shown[named] = ours(masks[label], **options), masks[label]
        beside[named] = f"torch.compile, {name}" if name in MODES else "torch.compile"
    uncompiled = {label for label in shown if label.endswith(", backend eager")}
    replayed = {label for label in variants for mode, replays in MODES.items() if replays and label.endswith(f", {mode}")}

    runs: dict[str, Callable[[], Any]] = {v: in_parts(calls(of, denoiser), parts) for v, denoiser in variants.items()}
    prepared: dict[str, Callable[[], Any]] = {}
    for label in shown:
        fast = variants[label]
        assert isinstance(fast, mc.OptimizedDenoiser)
        fast.warmup(*args, **kwargs)
        prepared[label] = fast.reset
    with ExitStack() as hooks:
        for interval, order in product((2, 3, 4), (1, 2)) if of.name == "dit" else ():
            hooked = load(of.name)[0].to(of.start.device, of.start.dtype)
            label = f"TaylorSeer hook, order {order}, uniform(interval={interval})"
            hook = taylorseer_hook(hooked, BLOCKS[of.name], interval, order, dtype=of.start.dtype)
            prepared[label] = hooks.enter_context(hook)
            runs[label], beside[label] = in_parts(calls(of, hooked), parts), "torch.compile"
        times = interleaved(runs, repeats, prepare=prepared, parts=parts)
        added = {v: added_memory(runs[v], prepared.get(v)) for v in runs.keys() - replayed} if on_gpu else {}
    found = []
    for label, timing in times.items():
        cost = mc.cost(program, shown[label]) if label in shown else None
        speedup = ratio(times[beside[label]], timing)
        found.append(
            {
                "denoiser": of.name,
                "variant": label,
                "share": None if cost is None else cost.share,
                "cache_mib": None if cost is None else cost.peak_cache_bytes / 2**20,
                "added_mib": added.get(label),
                "ms_a_step": 1000 * timing.median / of.steps,
                "spread": None if label == beside[label] else ratio_spread(times[beside[label]], timing),
                "over_eager": ratio(times["eager"], timing),
                "over_compiled": speedup,
                "realised_share": None if cost is None or label in uncompiled else speedup * cost.share,
            }
        )
    return found


def parts_of(of: Case) -> int:
    """Turns of a variant within a round."""
    return 1 if of.start.is_cuda else min(PARTS, of.steps)


def added_memory(run: Callable[[], Any], prepare: Callable[[], Any] | None) -> float:
    """MiB of GPU memory that a run, in one part, takes at most beside what is taken before it, the weights among that."""
    if prepare is not None:
        prepare()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rule_cost(of: Case, repeats: int, backend: str) -> list[dict[str, Any]]:
    """Milliseconds of the compiled original, of a step that holds, and of the same step that extrapolates."""
    program = mc.trace(of.denoiser, *of.calls[0][0], **of.calls[0][1])
    original = torch.compile(of.denoiser, fullgraph=True, dynamic=False, backend=backend)
    found = []
    for schedule in dict.fromkeys(schedule for schedule, _ in SCHEDULES[of.name]):
        args, kwargs = of.calls[3]
        whole_step = partial(original, *args, **kwargs)
        steps: dict[str, Callable[[], Any]] = {"original": whole_step}
        for rule in ("hold", "linear"):
            mask = Choice(schedule, 2, reuse=rule).mask(program, of)
            fast = mc.optimize(of.denoiser, mask, backend=backend, cuda_graphs=False)
            with torch.no_grad():
                for first, keywords in of.calls[:3]:  # computes, holds for lack of another computation, computes
                    fast(*first, **keywords)
            steps[rule] = partial(_again, fast, fast._threads.own.runs, args, kwargs)
        with torch.no_grad():
            # Each after a full step of the original, which leaves the same in the processor's caches for all.
            times = interleaved(steps, repeats, warmup=3, prepare=dict.fromkeys(steps, whole_step))
        cost, low, high = difference(times["linear"], times["hold"], times["original"])
        medians = {f"{step}_ms": 1000 * timing.median for step, timing in times.items()}
        label = Choice(schedule, 2).label
        found.append({"denoiser": of.name, "mask": label, **medians, "cost": cost, "low": low, "high": high, "rounds": repeats})
    return found


def _again(fast: mc.OptimizedDenoiser, runs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same step of the same run once more."""
    fast._threads.own.runs = runs
    fast(*args, **kwargs)


def rule_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| denoiser | mask | ms a step: original / hold / linear | linear adds, of an original step (quartiles) |",
        "|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['denoiser']} | {r['mask']} | {r['original_ms']:.1f} / {r['hold_ms']:.2f} / {r['linear_ms']:.2f} "
            f"| {r['cost']:+.1%} ({r['low']:+.1%} to {r['high']:+.1%}) |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    on_gpu = any(r["added_mib"] is not None for r in rows)
    lines = [
        "| denoiser | variant | MACs kept | ms a step | over eager | over torch.compile | spread | realised share | cache MiB |"
        + (" MiB added in a run |" if on_gpu else ""),
        "|" + "---|" * (10 if on_gpu else 9),
    ]
    for r in rows:
        forms = {"share": ".1%", "spread": ".0%", "realised_share": ".3f", "cache_mib": ".1f", "added_mib": ".0f"}
        said = {name: "" if r[name] is None else format(r[name], form) for name, form in forms.items()}
        lines.append(
            f"| {r['denoiser']} | {r['variant']} | {said['share']} | {r['ms_a_step']:.1f} "
            f"| {r['over_eager']:.2f}x | {r['over_compiled']:.3f}x | {said['spread']} | {said['realised_share']} "
            f"| {said['cache_mib']} |" + (f" {said['added_mib']} |" if on_gpu else "")
        )
    return "\n".join(lines)


def report(document: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown of ``latency.json``."""
    parts = ["# Latency"]
    for setting in dict.fromkeys(row["setting"] for row in document["rows"]):
        of_setting = {kind: [row for row in found if row["setting"] == setting] for kind, found in document.items()}
        parts += [table(of_setting["rows"]), setting]
        rounds = max(row["rounds"] for row in of_setting["rule"])
        parts += [
            f"What extrapolating costs, in single steps, each after a full one of the original; medians of {rounds} rounds:"
        ]
        parts += [rule_table(of_setting["rule"])]
    made = "Over torch.compile: ours in a further mode over the original in that mode, all else over the default mode."
    if all(row["added_mib"] is None for row in document["rows"]):
        made += " No GPU table has been made yet."
    return "\n\n".join([*parts, f"{made} Made by `python -m benchmarks.latency`."]) + "\n"


def with_new(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those of a denoiser at a setting replaced, or added at the end."""
    same = [(row["denoiser"], row["setting"]) == (new[0]["denoiser"], new[0]["setting"]) for row in rows]
    at = same.index(True) if any(same) else len(rows)
    return [*rows[:at], *new, *(row for row, replaced in zip(rows[at:], same[at:], strict=True) if not replaced)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", nargs="+", default=["unet", "dit"], choices=list(BATCH))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, help="pictures; default: as in benchmarks.peers")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    path = options.out / "latency.json"
    document: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {"rows": [], "rule": []}
    if "setting" in document or any("added_mib" not in row for row in document["rows"]):
        raise SystemExit(f"{path} was made by an older version; give another --out.")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.denoisers:
        use(options.device)
        of = case(name, options.steps, options.batch, options.device, getattr(torch, options.dtype))
        setting = (
            f"{of.steps} steps, batch {len(of.start)} pictures, {options.dtype}, backend {options.backend}, static shapes; "
            f"{hardware(device=options.device)}; medians of {options.repeats} rounds, in each of which a variant has "
            f"{parts_of(of)} turns, in random order, after one to warm up; spread: of the speed-up over torch.compile, "
            "(max - min) / median of the rounds."
        )
        new = {
            "rows": measure(of, options.repeats, options.backend),
            "rule": rule_cost(of, 20 * options.repeats, options.backend),
        }
        for kind, found in new.items():
            document[kind] = with_new(document[kind], [{"setting": setting, **row} for row in found])
        write_whole(path, json.dumps(document, indent=1) + "\n")
        write_whole(options.out / "latency.md", report(document))
    print(report(document))


if __name__ == "__main__":
    main()
