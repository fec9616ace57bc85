"""Other caches beside ours, really run, at the same share of MACs: ``python -m benchmarks.peers``.

For each denoiser of ``benchmarks.cases`` a published schedule as our mask, and every cache of ``benchmarks.rivals`` that knows
the denoiser, its interval, number of full steps or threshold chosen so that the MACs it runs, counted over an eager run, come
nearest to the mask's. Each runs eager, and under ``torch.compile`` in every way that gives the results of its eager run, ours
too: the whole denoiser with ``fullgraph=True``, or else with graph breaks, and the blocks alone that it puts its cache around.
What is timed are the denoiser's calls of one sampling run of the original. Each way lives in a process of its own, with empty
compiler caches, and the processes take turns; the table shows the fastest way, and lists the others. A cache that decides by
content is kept also where its compiled results differ, with a line that says so. CUDA graphs, ours or Inductor's, are used in
the rows that name their mode, and in no others.

The realised share is (speed-up over the original, eager or compiled alike) / (MACs before / MACs after). What is kept is the
most that tensors hold between steps. PSNR is that of a sampling run to the original's, where the denoiser is trained. Writes
``peers.json`` and ``peers.md``, a table for each machine, and goes on with the denoisers that this machine has not measured
yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import maskcompile as mc
from benchmarks import rows
from benchmarks.cases import BATCH, Case, calls, case, likeness, run, sample
from benchmarks.masks import SCHEDULES, Choice
from benchmarks.rivals import BLOCKS, COMPONENTS, RIVALS, Restart, Setting, as_found, evenly, taylorseer_computes
from benchmarks.timing import Timing, hardware, in_parts, interleaved, ratio, ratio_spread, synchronise, use
from maskcompile.files import write_whole

RESULTS = Path(__file__).parent / "results"

ORIGINAL = "original"
#: our variants: the schedule held, extrapolated, and what three rivals do that reuse other modules or at other steps: attention
#: alone, at the schedule's interval; the parts of transformer blocks, at all but as many steps as bring the share near the
#: schedule's; and all blocks extrapolated, at an interval that does
OURS = {
    "hold": "maskcompile", "linear": "maskcompile, linear", "attention": "maskcompile, attention alone",
    "transformers": "maskcompile, transformer blocks alone", "taylor": "maskcompile, as TaylorSeer",
}  # fmt: skip
#: of those, the rival that each does the same as
LIKE = {"attention": "pab", "transformers": "smoothcache", "taylor": "taylorseer"}
#: turns of a process within a round on a CPU; a GPU would be idle at the end of each
PARTS = 4
#: how times are taken, of so many turns
TIMED = (
    "in each of which a process has {parts} turns, in random order, to run as many parts of the run; spread: of the speed-up "
    "over eager, (max - min) / median of the rounds"
)
#: modes of ``torch.compile`` that record CUDA graphs; ours records its own in the rows compared with these, and in no other
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
#: thresholds to choose from
THRESHOLDS = tuple(float(t) for t in np.geomspace(0.001, 0.999, 60))
#: how far a compiled run may be from the eager one, of the largest number of the outputs
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 5e-2}


@dataclass(frozen=True)
class Setup:
    """What all variants of a denoiser have in common."""

    denoiser: str
    steps: int
    batch: int | None
    device: str
    dtype: str
    backend: str
    methods: tuple[str, ...] = (*OURS, *RIVALS)

    @property
    def parts(self) -> int:
        """Turns of a process within a round."""
        return 1 if self.device.startswith("cuda") else PARTS

    def case(self, batch: int | None = None) -> Case:
        return case(self.denoiser, self.steps, batch or self.batch, self.device, getattr(torch, self.dtype))


@dataclass(frozen=True)
class Variant:
    """method: ``ORIGINAL``, of ``OURS`` or of ``RIVALS``. compiled: "" is eager; else what ``torch.compile`` is asked for.

    how: "regions" for ours; "fullgraph", "graph breaks", or "blocks": what a rival puts its cache around is compiled first,
    and its decisions are left to Python.
    """

    method: str
    setting: Setting = 0
    compiled: str = ""
    how: str = "eager"

    @property
    def label(self) -> str:
        return f"{self.method}/{self.compiled}/{self.how}"


@cache
def traced(of: Case, method: str) -> mc.Program:
    """The denoiser with the blocks that one of ``OURS`` reuses: those that are found, or the modules that its rival reuses."""
    args, kwargs = of.calls[0]
    names = [name for name, _ in of.denoiser.named_modules() if re.fullmatch(BLOCKS[of.name], name)]
    return mc.trace(of.denoiser, *args, blocks=names if method in LIKE else None, **kwargs)


def our_mask(of: Case, method: str, setting: Setting) -> mc.Mask:
    """The mask of one of ``OURS``: the first schedule of ``benchmarks.masks`` for the denoiser, or its rival's as it is set."""
    program = traced(of, method)
    if method not in LIKE:
        return replace(Choice(*SCHEDULES[of.name][0]), reuse=method).mask(program, of)
    last = [name.rpartition(".")[2] for name in program.names]
    if method == "taylor":
        reused = [True] * len(last)
        full = [int(taylorseer_computes(step, int(setting), warmup=1)) for step in range(of.steps)]
    elif method == "attention":
        reused = [name.startswith("attn") for name in last]
        full = [int(step % int(setting) == 0) for step in range(of.steps)]
    else:
        reused, full = [name in COMPONENTS[of.name][1] for name in last], evenly(of.steps, int(setting))
    compute = np.array(full, np.bool_)[:, None] | ~np.array(reused)
    rule = "linear" if method == "taylor" else "hold"
    return mc.Mask(compute, blocks=program.names, timesteps=of.timesteps, reuse=rule)


def same_decisions(of: Case, variant: Variant) -> bool:
    """Whether one of ``OURS`` is our schedule by another name."""
    masks = our_mask(of, variant.method, variant.setting), our_mask(of, "hold", 0)
    return masks[0].blocks == masks[1].blocks and np.array_equal(masks[0].compute, masks[1].compute)


def optimised(of: Case, variant: Variant, backend: str, **options: Any) -> mc.OptimizedDenoiser:
    args, kwargs = of.calls[0]
    fast = mc.optimize(of.denoiser, our_mask(of, variant.method, variant.setting), backend=backend, **options)
    fast.warmup(*args, **kwargs)
    return fast


@contextmanager
def installed(of: Case, variant: Variant) -> Iterator[tuple[Callable[..., Any], Restart]]:
    """(what to call, how to begin another run) of an uncompiled variant."""
    if variant.method in RIVALS:
        with RIVALS[variant.method].install(of, variant.setting) as restart:
            yield of.denoiser, restart
    elif variant.method in OURS:
        fast = optimised(of, variant, "eager")
        yield fast, fast.reset
    else:
        yield of.denoiser, lambda: None


# ---- what a method computes, keeps and draws, uncompiled --------------------------------------------------------------------


def counted(of: Case, denoiser: Callable[..., Any]) -> int:
    """MACs that a run really computes."""
    with FlopCounterMode(display=False) as counter:
        for call in calls(of, denoiser):
            call()
    return int(counter.get_total_flops()) // 2


def macs(of: Case, variant: Variant) -> int:
    """MACs that a run of the variant really computes."""
    with installed(of, variant) as (denoiser, restart):
        restart()
        return counted(of, denoiser)


def nearest(share: Callable[[Setting], float], settings: Sequence[Setting], target: float) -> Setting:
    """The setting whose share is nearest to the target, by bisection: the share rises or falls with the settings."""
    known = {0: share(settings[0]), len(settings) - 1: share(settings[-1])}
    low, high = 0, len(settings) - 1
    rising = known[high] >= known[low]
    while high - low > 1:
        middle = (low + high) // 2
        known[middle] = share(settings[middle])
        if (known[middle] < target) == rising:
            low = middle
        else:
            high = middle
    return settings[min(known, key=lambda index: abs(known[index] - target))]


def tuned(of: Case, small: Case, method: str, target: float) -> Setting:
    """The setting with which a rival's share of the MACs is nearest to the target.

    small: the case with fewer pictures, on which schedules are counted; thresholds depend on the pictures.
    """
    settings = RIVALS[method].settings
    on = of if settings is None else small
    total = macs(on, Variant(ORIGINAL))
    chosen = THRESHOLDS if settings is None else settings(of.steps)
    return nearest(lambda setting: macs(on, Variant(method, setting)) / total, chosen, target)


@torch.no_grad()
def kept_bytes(of: Case, denoiser: Callable[..., Any]) -> int:
    """The most bytes of tensors that are there after a step of a run, and were not before it, the step's output aside."""
    gc.collect()
    gc.freeze()  # what is there already is looked at no more
    try:
        most = 0
        for args, kwargs in of.calls:
            output = denoiser(*args, **kwargs)[0].untyped_storage().data_ptr()
            found = (x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor)
            sizes = {storage.data_ptr(): storage.nbytes() for storage in found}
            most = max(most, sum(size for place, size in sizes.items() if place != output))
        return most
    finally:
        gc.unfreeze()


def describe(setup: Setup) -> list[dict[str, Any]]:
    """For every method: its setting, share of the MACs, MiB kept, PSNR; or why it is not run."""
    of, small = setup.case(), setup.case(1)
    total = macs(of, Variant(ORIGINAL))
    pictures = sample(of, of.denoiser) if of.trained else None
    found: list[dict[str, Any]] = [{"method": ORIGINAL, "setting": 0, "share": 1.0}]
    target = 1.0
    rivals = [name for name, rival in RIVALS.items() if setup.denoiser in rival.denoisers and name in setup.methods]
    ours = [m for m in OURS if m == "hold" or (m in setup.methods and LIKE.get(m, ORIGINAL) in (ORIGINAL, *rivals))]
    for method in [*ours, *rivals]:
        if method in rivals and RIVALS[method].missing:
            module = RIVALS[method].module
            found.append({"method": method, "error": f"{module} is not installed: pip install 'maskcompile[peers]'"})
            continue
        try:
            like = LIKE.get(method, method)
            variant = Variant(method, tuned(of, small, like, target) if like in rivals else 0)
            if method == "transformers" and same_decisions(of, variant):
                continue
            with installed(of, variant) as (denoiser, restart):
                restart()
                row: dict[str, Any] = {"method": method, "setting": variant.setting, "share": counted(of, denoiser) / total}
                restart()
                row["kept_mib"] = kept_bytes(of, denoiser) / 2**20
                if pictures is not None:
                    restart()
                    row["psnr"] = likeness(sample(of, denoiser), pictures)
            found.append(row)
            if method == "hold":
                target = row["share"]
        except Exception as error:
            found.append({"method": method, "error": one_line(error)})
    return found


# ---- a process for each variant ---------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line that says something, after the advice that Dynamo puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


@contextmanager
def compiled(of: Case, variant: Variant, backend: str, options: dict[str, Any]) -> Iterator[tuple[Callable[..., Any], Restart]]:
    """(what to call, how to begin another run) of the original or a rival under ``torch.compile``."""
    uncompiled = Variant(variant.method, variant.setting)
    if variant.how == "blocks":
        with as_found(of.denoiser):
            for name, module in of.denoiser.named_modules():
                if re.fullmatch(RIVALS[variant.method].wraps[of.name], name):
                    module.forward = torch.compile(module.forward, backend=backend, **options)
            with installed(of, uncompiled) as found:
                yield found
    else:
        with installed(of, uncompiled) as (denoiser, restart):
            yield torch.compile(denoiser, fullgraph=variant.how == "fullgraph", backend=backend, **options), restart


def differing(variant: Variant, outputs: list[Tensor], expected: list[Tensor]) -> str | None:
    """How far results are from those expected, where it is more than what compiling may change; None where it is not.

    A cache that decides by content may come to other decisions when it is compiled, and is kept. Raises ValueError for all
    others, and for numbers that are not finite.
    """
    largest = max(float(x.abs().max()) for x in expected)
    apart = float(np.max([float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True)])) / largest
    if apart < TOLERANCE[expected[0].dtype]:
        return None
    said = f"its results are {apart:.2g} of the largest number away from those of its eager run"
    if variant.method in RIVALS and RIVALS[variant.method].settings is None and np.isfinite(apart):
        return f"{said}; it decides by content, and is kept"
    raise ValueError(said)


def eager_results(of: Case, variant: Variant) -> list[Tensor]:
    """The outputs of a run of the variant uncompiled."""
    with installed(of, Variant(variant.method, variant.setting)) as (denoiser, restart):
        restart()
        return run(of, denoiser)


def ready_to_run(
    of: Case, setup: Setup, variant: Variant, stack: ExitStack
) -> tuple[Callable[[], Any], Restart, dict[str, Any]]:
    """(a run, how to begin another, what is to be said of the compilation), until the stack is left.

    Raises ValueError where two runs do not give the results of an eager one; see ``differing``.
    """
    if not variant.compiled:
        denoiser, restart = stack.enter_context(installed(of, variant))
        return in_parts(calls(of, denoiser), setup.parts), restart, {}
    options: dict[str, Any] = {} if variant.compiled == "default" else {"mode": variant.compiled}
    if variant.method in OURS:
        fast = optimised(of, variant, setup.backend, cuda_graphs=variant.compiled in CUDA_GRAPHS, **options)
        denoiser, restart, expected = fast, fast.reset, None
    else:
        expected = eager_results(of, variant)
        denoiser, restart = stack.enter_context(compiled(of, variant, setup.backend, options))
    restart()
    outputs = run(of, denoiser)
    restart()
    outputs += run(of, denoiser)
    if expected is None:
        expected = eager_results(of, variant)
    return in_parts(calls(of, denoiser), setup.parts), restart, {"note": differing(variant, outputs, expected * 2)}


def serve(pipe: Any, setup: Setup, variant: Variant | None, folder: str, threads: int) -> None:
    """In a process of its own: make the variant ready, then run it whenever told to. No variant: describe them all."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    inductor.compile_threads = 1  # its environment variable was read when the server of processes imported it
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    stack = ExitStack()
    try:
        use(setup.device)
        if variant is None:
            pipe.send({"methods": describe(setup)})
            return
        execute, restart, said = ready_to_run(setup.case(), setup, variant, stack)
        restart()
        for _ in range(setup.parts):
            execute()
        pipe.send(said)
        while True:
            {"restart": restart, "execute": execute}[pipe.recv()]()
            synchronise()
            pipe.send(True)
    except EOFError:  # the other side has ended
        return
    except Exception as error:
        pipe.send({"error": one_line(error)})


class Process:
    """One variant in its process. said: what it reported when it was ready, or an ``error``."""

    def __init__(self, setup: Setup, variant: Variant | None, patience: float, threads: int) -> None:
        # Diffusers asks for CUDA devices when it is imported, after which no process may be forked that synchronises with one.
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["benchmarks.rivals", "maskcompile"])
        self.pipe, theirs = context.Pipe()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        arguments = (theirs, setup, variant, self.folder.name, threads)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.said = self.pipe.recv() if self.pipe.poll(patience) else {"error": f"not ready after {patience:.0f} s"}
        except EOFError:
            self.said = {"error": "its process ended"}
        if "error" in self.said:
            self.end()

    def tell(self, what: str) -> None:
        """Let it "restart", or "execute" the next part of its run, and wait until it has."""
        self.pipe.send(what)
        if (answer := self.pipe.recv()) is not True:
            raise RuntimeError(answer["error"])

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()
        self.folder.cleanup()


def compilations(setup: Setup, method: str) -> tuple[str, ...]:
    """What a method is compiled as: "" for not at all, the default, and on CUDA Inductor's modes with CUDA graphs."""
    graphs = tuple(CUDA_GRAPHS) if setup.device.startswith("cuda") and setup.backend == "inductor" else ()
    if method in OURS:
        return ("default", *graphs)
    # Rivals are many and autotuning is slow: of these modes they get the one that is for launches alone.
    return ("", "default", *(graphs if method == ORIGINAL else graphs[:1]))


def ways(variant: Variant) -> list[Variant]:
    """The ways of compiling that are tried; "graph breaks" only where "fullgraph" fails."""
    if not variant.compiled:
        return [variant]
    if variant.method in OURS:
        return [replace(variant, how="regions")]
    hows = ("fullgraph",) if variant.method == ORIGINAL else ("fullgraph", "blocks")
    return [replace(variant, how=how) for how in hows]


def begun(setup: Setup, patience: float, threads: int, variant: Variant) -> list[tuple[Variant, Process]]:
    """The variant in its process; where it cannot be compiled without graph breaks, also with them."""
    found = [(variant, Process(setup, variant, patience, threads))]
    if variant.how == "fullgraph" and "error" in found[0][1].said:
        found += begun(setup, patience, threads, replace(variant, how="graph breaks"))
    return found


def measure(setup: Setup, repeats: int, jobs: int, patience: float) -> dict[str, Any]:
    """All variants of a denoiser, timed in turn; see the module."""
    threads = torch.get_num_threads()
    described = Process(setup, None, 10 * patience, threads)
    if "error" in described.said:
        raise RuntimeError(f"{setup.denoiser}: {described.said['error']}")
    described.end()
    methods = {m["method"]: m for m in described.said["methods"]}
    variants = [
        way
        for name, m in methods.items()
        if "error" not in m
        for mode in compilations(setup, name)
        for way in ways(Variant(name, m["setting"], mode))
    ]
    with ThreadPoolExecutor(jobs) as pool:
        started = pool.map(partial(begun, setup, patience, threads), variants)
        progress = tqdm(started, total=len(variants), desc=f"{setup.denoiser}: compiling", leave=False, disable=None)
        processes = [pair for pairs in progress for pair in pairs]
    ready = {variant: process for variant, process in processes if "error" not in process.said}
    try:
        told = {what: {v.label: partial(p.tell, what) for v, p in ready.items()} for what in ("restart", "execute")}
        times = interleaved(told["execute"], repeats, prepare=told["restart"], parts=setup.parts)
    finally:
        for process in ready.values():
            process.end()
    said = [(variant, process.said) for variant, process in processes]
    return {
        "hardware": hardware(device=setup.device),
        "methods": sorted(setup.methods),
        "timed": TIMED.format(parts=setup.parts),
        "variants": best_of_ways(setup.steps, methods, said, times),
    }


def best_of_ways(
    steps: int, methods: dict[str, dict[str, Any]], said: list[tuple[Variant, dict[str, Any]]], times: dict[str, Timing]
) -> list[dict[str, Any]]:
    """A row for each method as it is compiled, of the fastest way; the other ways, and what is to be said, in its attempts.

    said: what each variant's process said. times: by the labels of the variants that ran.

    Raises RuntimeError where the original itself did not run.
    """
    ran: dict[tuple[str, str], list[Variant]] = {}
    for variant, _ in said:
        ran.setdefault((variant.method, variant.compiled), [])
        if variant.label in times:
            ran[variant.method, variant.compiled].append(variant)
    if not ran[ORIGINAL, ""]:
        raise RuntimeError(f"the original did not run: {'; '.join(s['error'] for v, s in said if v == Variant(ORIGINAL))}.")
    eager = times[Variant(ORIGINAL).label]
    best = {key: max(found, key=lambda v: ratio(eager, times[v.label])) for key, found in ran.items() if found}
    rows = []
    for (method, mode), found in ran.items():
        row = {**methods[method], "compiled": mode}
        tried = [(v, s) for v, s in said if (v.method, v.compiled) == (method, mode)]
        failed = [f"{v.how}: {s['error']}" for v, s in tried if "error" in s]
        if not found:
            rows.append({**row, "error": "; ".join(failed)})
            continue
        fastest = best[method, mode]
        timing = times[fastest.label]
        others = [(v.how, times[v.label]) for v in found if v != fastest]
        slower = [
            f"{how}: slower, {1000 * other.median / steps:.1f} ms a step (spread {ratio_spread(eager, other):.0%})"
            for how, other in others
        ]
        notes = [f"{v.how}: {s['note']}" for v, s in tried if s.get("note")]
        row |= {"how": fastest.how, "attempts": failed + slower + notes}
        row |= {"ms": 1000 * timing.median / steps, "over_eager": ratio(eager, timing)}
        row["spread"] = None if timing is eager else ratio_spread(eager, timing)
        by_default, alike = best.get((ORIGINAL, "default")), best.get((ORIGINAL, mode))
        row["over_compiled"] = ratio(times[by_default.label], timing) if by_default else None
        row["realised_share"] = ratio(times[alike.label], timing) * row["share"] if alike and method != ORIGINAL else None
        rows.append(row)
    return rows + [m for m in methods.values() if "error" in m]


# ---- the table --------------------------------------------------------------------------------------------------------------


def label(denoiser: str, row: dict[str, Any]) -> str:
    """The method with what it was set to."""
    method = row["method"]
    if method == ORIGINAL:
        return ORIGINAL
    if method in ("transformers", "taylor") and "setting" in row:
        said = "{} full steps" if method == "transformers" else "interval {}"
        return f"**{OURS[method]}**, {said.format(row['setting'])}"
    if method in OURS:
        return f"**{OURS[method]}**" + ("" if method in LIKE else f", {Choice(*SCHEDULES[denoiser][0]).label}")
    if "setting" not in row:
        return RIVALS[method].label
    setting = row["setting"]
    if isinstance(setting, float):
        return f"{RIVALS[method].label}, threshold {setting:.3g}"
    counted = f"{setting} full steps" if len(RIVALS[method].settings(100) or ()) > 10 else f"interval {setting}"  # type: ignore[misc]
    return f"{RIVALS[method].label}, {counted}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each variant that ran, and lines on what did not."""
    lines = [
        "| denoiser | method | compiled | MACs | ms a step | over eager | spread | over torch.compile | realised share "
        "| kept MiB | PSNR dB |",
        "|" + "---|" * 11,
    ]
    notes = []
    for result in results:
        for row in result["variants"]:
            name = label(result["denoiser"], row)
            asked = {"": "eager", "default": "torch.compile"}.get(row.get("compiled", ""), row.get("compiled", ""))
            notes += [f"* {result['denoiser']}, {name}, {asked}: {attempt}" for attempt in row.get("attempts", ())]
            if "error" in row:
                notes.append(f"* {result['denoiser']}, {name}, {asked}, not run: {row['error']}")
                continue

            def shown(key: str, form: str, row: dict[str, Any] = row) -> str:
                return "" if row.get(key) is None else format(row[key], form)

            how = row["how"] + ("" if row["compiled"] in ("", "default") else f", {row['compiled']}")
            cells = [shown("share", ".1%"), shown("ms", ".1f"), shown("over_eager", ".2f") + "x", shown("spread", ".0%")]
            cells += [shown("over_compiled", ".2f") + "x", shown("realised_share", ".3f")]
            cells += [shown("kept_mib", ".1f"), shown("psnr", ".1f")]
            lines.append(f"| {' | '.join([result['denoiser'], name, how, *cells])} |")
    if notes:
        lines += ["", "Ways of compiling that failed, gave other results or were slower, and what was not run:", "", *notes]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--methods", nargs="+", default=[*OURS, *RIVALS], choices=[*OURS, *RIVALS], help="ours is always there")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, help="pictures; default: so that a step takes 50 to 100 ms on two cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=[str(dtype).split(".")[1] for dtype in TOLERANCE])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--jobs", type=int, help="variants compiled at once; default: at most 4, 1 on a GPU")
    parser.add_argument("--patience", type=float, default=300, help="seconds that a variant may take to be ready")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("steps", "batch", "repeats", "device", "dtype", "backend")}
    path = options.out / "peers.json"
    done = rows.opened(path, given, options.fresh)
    for name in options.denoisers:
        # What was measured elsewhere, or beside others, is another result.
        key = f"{name} on {hardware(device=options.device)}: {', '.join(sorted(options.methods))}"
        if key in done:
            continue
        given_to_all = (options.steps, options.batch, options.device, options.dtype, options.backend)
        setup = Setup(name, *given_to_all, tuple(options.methods))
        jobs = options.jobs or (1 if options.device.startswith("cuda") else min(4, os.cpu_count() or 1))
        result = measure(setup, options.repeats, jobs, options.patience)
        rows.add(
            path,
            {"key": key, "denoiser": name, "pictures": options.batch or BATCH[name], **result},
        )
    text = document(json.loads(path.read_text()))
    write_whole(options.out / "peers.md", text)
    print(text)


def document(found: dict[str, Any]) -> str:
    """Markdown of ``peers.json``: a table for each machine, way of timing and choice of methods."""
    parts = ["# Peers"]
    for alike in dict.fromkeys((row["hardware"], row["timed"], tuple(row["methods"])) for row in found["rows"]):
        machine, timed, _ = alike
        results = [row for row in found["rows"] if (row["hardware"], row["timed"], tuple(row["methods"])) == alike]
        results.sort(key=lambda row: list(BATCH).index(row["denoiser"]))
        pictures = ", ".join(f"{row['denoiser']} {row['pictures']}" for row in results)
        setting = (
            f"{machine}; {found['device']}, {found['dtype']}, backend {found['backend']}; {found['steps']} steps, "
            f"batches of pictures: {pictures}; medians of {found['repeats']} rounds after one warm-up round, "
            f"{timed}."
        )
        parts += [table(results), setting]
    return "\n\n".join(parts) + "\nMade by `python -m benchmarks.peers`.\n"


if __name__ == "__main__":
    main()
