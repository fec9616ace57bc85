"""``learn``: a denoiser, a sampler and a share of the MACs in, a mask out."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from maskcompile._version import __version__
from maskcompile.accounting import by_knowledge
from maskcompile.learning import reach
from maskcompile.learning.budget import TOLERANCE, Shares, check_budget, first_cells, ranked, single_cells, spans
from maskcompile.learning.fidelity import FLOOR, Fidelity
from maskcompile.learning.memo import Memo
from maskcompile.learning.processes import Processes, launched
from maskcompile.learning.recording import Recording, Sample, record
from maskcompile.learning.relaxed import RelaxedDenoiser
from maskcompile.learning.scores import Paper, Target, converged, learn_scores
from maskcompile.learning.search import Evaluations, Found, check_finite, search
from maskcompile.learning.sensitivity import AT, sensitivities
from maskcompile.mask import Mask, MaskError, check_mask
from maskcompile.program import Program, trace
from maskcompile.runs import Clock, rounding
from maskcompile.runtime import OptimizedDenoiser
from maskcompile.schedules import deepcache
from maskcompile.signature import check_capturable
from passes.blocks import BlockSelection
from passes.rectify import Compute


@dataclass(frozen=True)
class Search:
    """The default method, for ``learn(method=...)``: see ``maskcompile.learning.search``.

    passes: denoiser work of the search, in unmasked sampling passes over all seeds; a masked pass counts for the share of the
    MACs that it keeps. starts: further masks to begin with, for the same blocks and timesteps. reach: whether to fit how far
    "linear" reaches at each step, which comes on top, see ``fit_reach``.
    """

    passes: float = 150.0
    starts: tuple[Mask, ...] = ()
    reach: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.passes < float("inf"):
            raise ValueError(f"passes is the work of the search in sampling passes, above 0; got {self.passes!r}.")


METHODS: dict[str, Search | Paper] = {"search": Search(), "paper": Paper()}


def learn(
    model: nn.Module,
    sample: Sample,
    budget: float,
    *,
    method: str | Search | Paper = "search",
    reuse: str | Sequence[str] = "auto",
    log_snr: Iterable[float] | None = None,
    seeds: Sequence[int] = (0, 1),
    blocks: BlockSelection | None = None,
    timestep: str | None = None,
    backend: str | Callable[..., Any] = "eager",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Mask:
    """Learn a mask that keeps a share ``budget`` of the MACs (met within 0.01), and the samples as they are.

    sample: ``sample(seed)`` runs one sampling pass that calls ``model``: a plain loop, or a pipeline,
    ``lambda seed: pipe(..., generator=torch.Generator().manual_seed(seed))``. It must do the same for the same seed; what it
    returns (tensors, arrays, pictures, a pipeline's output) is what the search compares, best without rounding to bytes
    (``output_type="pt"`` or "latent"). Noise is all it needs: there are no training data, and no weights change.

    method: "search" (default), whole masked passes compared with unmasked ones; "paper", the scores of arXiv 2603.19939, each
    step by itself; or one of these with options, ``Search(passes=...)``, ``Paper(relaxation="gumbel", ...)``. reuse: a rule
    of ``Mask``, or one for each block; "auto" lets the search choose, and holds in the paper's method. log_snr: of each step,
    see ``Mask``; *linear* gains by it. seeds: sampling passes to learn from. blocks: what may be reused, see ``trace``.
    timestep: name of the parameter that carries it, where it is unusual. backend: of masked passes, see ``optimize``.
    checkpoint: a file that learning goes on from when it is interrupted, to the same mask. progress: show a bar.

    Under ``accelerate launch`` or torchrun the processes share the work and all return the same mask as one alone would.

    Raises MaskError for a budget below what always runs, ValueError for a sampler that cannot be learned from, a model in train
    mode, a checkpoint of other settings, FloatingPointError with the step where something is not finite. The model is left
    as it was, with its gradients and modes.
    """
    if isinstance(model, OptimizedDenoiser):
        raise ValueError("this denoiser is already optimised; learn with the original: learn(fast.original, ...).")
    check_capturable(model)
    options = METHODS.get(method, method) if isinstance(method, str) else method
    if not isinstance(options, Search | Paper):
        raise ValueError(f"method is 'search' or 'paper', or Search(...) or Paper(...); got {method!r}.")
    seeds, budget = _checked_seeds(seeds), float(budget)
    check_budget(budget, 0.0)
    with launched() as processes, torch.inference_mode(False):
        recordings = [record(model, sample, seed, timestep) for seed in seeds]
        _check_alike(recordings)
        first = recordings[0].steps[0][0].call
        program = trace(model, *first.args, blocks=blocks, **first.kwargs)
        if not program.blocks:
            raise ValueError(f"no block was found in {type(model).__name__}; name some by learn(..., blocks=[...]).")
        template = _template(program, recordings[0].timesteps, log_snr)
        rules = _rules(reuse, template, options)
        template = template.replace(reuse=rules[0])
        shares = Shares(spans(model, program, recordings[0]), template)
        check_budget(budget, shares(np.zeros_like(template.compute)))
        if budget == 1:
            return template.replace(method="none", budget=budget, share=1.0)
        settings = {
            "denoiser": program.denoiser, "block hash": program.block_hash, "blocks": program.names,
            "timesteps": template.timesteps, "log-SNR": template.log_snr, "budget": budget, "seeds": list(seeds),
            "reuse rule": rules, "method": [type(options).__name__, repr(options)], "weights": _weights_sum(model),
            "sampler (what it calls the denoiser with, and returns)": _digest(recordings),
            "backend": backend if isinstance(backend, str) else repr(backend),
        }  # fmt: skip
        memo = Memo(checkpoint, settings, writes=processes.rank == 0)
        memo.results = processes.first(memo.results)  # others may not see the file
        relaxed = RelaxedDenoiser(model, program.names)
        with tqdm(desc="learning", disable=None if progress and processes.rank == 0 else True, unit="pass") as bar:
            learning = _Learning(recordings, program, template, budget, shares, relaxed, memo, processes, bar)
            if isinstance(options, Paper):
                mask = _by_scores(learning, options)
            else:
                fidelity = Fidelity(model, sample, recordings, template, backend, timestep, processes)
                mask = _by_search(learning, options, rules, fidelity)
    share = shares(mask.compute, mask.reuse)
    if share < budget - TOLERANCE:
        warnings.warn(
            f"the learned mask keeps {share:.3f} of the MACs, and the budget is {budget:g}: no block is small enough for more.",
            stacklevel=2,
        )
    found: dict[str, Any] = {"budget": budget, "share": round(share, 5), "seeds": list(seeds)}
    return mask.replace(**found, torch=torch.__version__, maskcompile=__version__)


def fit_reach(
    model: nn.Module,
    mask: Mask,
    sample: Sample,
    *,
    seeds: Sequence[int] = (0, 1),
    timestep: str | None = None,
    backend: str | Callable[..., Any] = "eager",
    progress: bool = True,
) -> Mask:
    """The mask with how far "linear" reaches at each step fitted to samples: a better one at the same cost.

    For any mask that extrapolates, a published schedule for one; ``learn``'s search does it by itself. It takes two masked
    sampling passes for each step that reuses something, of up to 32 steps, and a dozen more: see
    ``maskcompile.learning.reach``. sample, seeds, timestep, backend, progress: as for ``learn``; the samples have two elements
    at least. The mask comes back as it was where nothing is gained.

    Raises MaskError for a mask that extrapolates nothing, or not made for the timesteps of the sampler, and ValueError as
    ``learn`` does.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"a reach is fitted to a maskcompile.Mask; got {type(mask).__name__}.")
    if "linear" not in mask.reuse:
        raise MaskError("the mask holds whatever it reuses, so nothing reaches anywhere: mask.replace(reuse='linear') does.")
    if isinstance(model, OptimizedDenoiser):
        raise ValueError("this denoiser is already optimised; fit with the original: fit_reach(fast.original, mask, ...).")
    check_capturable(model)
    check_mask(mask, model)
    seeds = _checked_seeds(seeds)
    with launched() as processes, torch.inference_mode(False):
        recordings = [record(model, sample, seed, timestep) for seed in seeds]
        _check_alike(recordings)
        first = recordings[0]
        _check_timesteps(mask, first)
        call = first.steps[0][0].call
        program = trace(model, *call.args, blocks=list(mask.blocks), **call.kwargs)
        shares = Shares(spans(model, program, first), mask)
        full = Mask.full(mask.blocks, mask.timesteps)
        fidelity = Fidelity(model, sample, recordings, full, backend, timestep, processes)
        with tqdm(desc="fitting", disable=None if progress and processes.rank == 0 else True, unit="pass") as bar:
            evaluate = Evaluations(fidelity, shares, Memo(None, {}), bar)
            bar.total = round(1 + shares(mask.compute, mask.reuse) + reach.work(mask, evaluate))
            evaluate.spend(1.0)
            start = Found(mask, evaluate(mask))
            check_finite(start, evaluate)
            found = reach.fit(start, evaluate)
    if found.mask is mask:
        return mask
    decibels = round(float(found.decibels.mean()), 3)
    return found.mask.replace(reach_passes=round(evaluate.passes, 1), fidelity_db=decibels, reach_seeds=list(seeds))


def _checked_seeds(seeds: Iterable[int]) -> list[int]:
    """As Python's own numbers, which a file can hold. Raises ValueError where there are none, or one twice."""
    found = [operator.index(seed) for seed in seeds]
    if not found or len(set(found)) != len(found):
        raise ValueError(f"seeds are one or more different numbers; got {found}.")
    return found


def _check_timesteps(mask: Mask, recording: Recording) -> None:
    """Raises MaskError unless the sampler calls the denoiser at the mask's timesteps, within the rounding of their dtype."""
    clock, given = Clock(mask), recording.steps[0][0].call.timestep
    steps = [clock.step(timestep, 0.0 if given is None else rounding(given)) for timestep in recording.timesteps]
    wrong = next((i for i, step in enumerate(steps) if step != i), None)
    if wrong is not None or len(steps) != mask.steps:
        at = min(mask.steps, len(steps)) if wrong is None else wrong
        ours, theirs = (f"{given[at]:g}" if at < len(given) else "none" for given in (mask.timesteps, recording.timesteps))
        raise MaskError(
            f"the mask is for {mask.steps} timesteps and sample({recording.seed}) called the denoiser at {len(steps)}; at "
            f"step {at} the mask has {ours} and the sampler {theirs}. Fit it with the sampler that it is for."
        )


@dataclass(frozen=True)
class _Learning:
    """What both methods need. template: the full mask, with the rules to learn for."""

    recordings: Sequence[Recording]
    program: Program
    template: Mask
    budget: float
    shares: Shares
    relaxed: RelaxedDenoiser
    memo: Memo
    processes: Processes
    bar: Any


def _by_search(learning: _Learning, options: Search, rules: Sequence[Sequence[str]], fidelity: Fidelity) -> Mask:
    template, memo, recordings = learning.template, learning.memo, learning.recordings
    learning.bar.total = options.passes
    evaluate = Evaluations(fidelity, learning.shares, memo, learning.bar)
    evaluate.spend(1.0)  # the recordings

    def sensitivity(mask: Mask) -> NDArray[np.float64]:
        if "sensitivity" not in memo:
            steps = range(1, template.steps)
            rows = sensitivities(learning.relaxed, recordings[0], mask, learning.processes.stretch(steps))
            every = learning.processes.gather({step: row.tolist() for step, row in rows.items()})
            memo["sensitivity"] = [[0.0] * len(mask.blocks), *(every[step] for step in steps)]
        evaluate.spend((1 + 3 * len(AT)) / len(recordings))
        return np.asarray(memo["sensitivity"])

    starts = [_fitting(template, mask) for mask in options.starts]
    starts += _deepcaches(learning.program, template, learning.budget, learning.shares)
    macs = np.array([block.macs for block in learning.program.blocks], dtype=np.float64)
    found = search(template, starts, rules, sensitivity, macs, learning.budget, options.passes, evaluate)
    if options.reach:
        learning.bar.total = round(evaluate.passes + reach.work(found.mask, evaluate))
        found = reach.fit(found, evaluate)
    return found.mask.replace(
        method="search", passes=round(evaluate.passes, 1), fidelity_db=round(float(found.decibels.mean()), 3)
    )


def _by_scores(learning: _Learning, options: Paper) -> Mask:
    template, program, budget, bar = learning.template, learning.program, learning.budget, learning.bar
    macs = np.array([block.macs for block in program.blocks], dtype=np.float64)
    seeds, processes = len(learning.recordings), learning.processes
    visited = (template.steps - 1) / template.steps  # the first step is computed in full, and not learned
    # 1 for the recordings
    passes = 1 + (options.scaling + options.epochs * (1 + 3 * options.updates * visited)) / seeds
    bar.total = round(passes)
    bar.update(1)

    shown: dict[str, str] = {}

    def report(forwards: float, share: float | None = None, error: float | None = None) -> None:
        bar.update(forwards / template.steps / seeds * processes.count)
        if share is not None:
            shown["share"] = f"{share:.3f}"
        if error is not None:
            shown["fidelity"] = f"{-10 * np.log10(max(error, FLOOR)):.1f} dB a step"
        bar.set_postfix(shown, refresh=share is not None)

    floor = learning.shares(np.zeros_like(template.compute))
    target = Target(np.maximum(macs / max(1, program.macs), 1e-6), floor, budget, template.rules)
    scores = learn_scores(learning.relaxed, learning.recordings, target, options, learning.memo, processes, report)

    def ruled(compute: Compute) -> Compute:
        return by_knowledge(program, template.blocks, compute, options.rectification)

    start = np.zeros_like(template.compute)
    start[0] = True
    cells = ranked(scores)

    shares = learning.shares
    compute = first_cells(start, cells, lambda c: shares(ruled(c)), budget)
    compute = shares.rectified(template.replace(ruled(compute)))

    def kept(compute: Compute) -> float:
        """The share, out of reach for what the rules would take away again."""
        return shares(compute) if (ruled(compute) == compute).all() else float("inf")

    compute = single_cells(compute, cells, kept, budget)
    compute = single_cells(compute, cells, shares, budget) if shares(compute) < budget - TOLERANCE else compute
    described: dict[str, Any] = {"options": {**asdict(options), "rectification": list(options.rectification)}}
    described |= converged(scores)
    return template.replace(compute, method="paper", passes=round(passes, 1), **described)


def _check_alike(recordings: Sequence[Recording]) -> None:
    first = recordings[0]
    for other in recordings[1:]:
        ours, theirs = ([len(step) for step in r.steps] for r in (first, other))
        if ours != theirs or first.timesteps != other.timesteps:
            raise ValueError(
                f"sample({other.seed}) called the denoiser {sum(theirs)} times at {len(theirs)} timesteps, "
                f"sample({first.seed}) {sum(ours)} times at {len(ours)}; a mask needs the same timesteps for every seed."
            )


def _template(program: Program, timesteps: Sequence[float], log_snr: Iterable[float] | None) -> Mask:
    full = np.ones((len(timesteps), len(program.names)), dtype=np.bool_)
    made_for: dict[str, Any] = {"denoiser": program.denoiser, "block_hash": program.block_hash}
    return Mask(full, blocks=program.names, timesteps=timesteps, log_snr=log_snr, **made_for)


def _rules(reuse: str | Sequence[str], template: Mask, options: Search | Paper) -> list[tuple[str, ...]]:
    """Rules to choose from, each one for each block."""
    if reuse == "auto":
        wanted: Sequence[str | Sequence[str]] = ("linear", "hold") if isinstance(options, Search) else ("hold",)
    else:
        wanted = (reuse,)
    return [template.replace(reuse=rule).reuse for rule in wanted]


def _fitting(template: Mask, mask: Mask) -> Compute:
    if (mask.blocks, mask.timesteps) != (template.blocks, template.timesteps):
        raise MaskError("a mask to start from must be for the same blocks and timesteps as the one to learn.")
    return mask.compute


def _deepcaches(program: Program, template: Mask, budget: float, shares: Shares) -> list[Compute]:
    """The densest DeepCache within the budget, with one, three and five leading steps; none where it does not apply."""
    found = []
    for warmup in (1, 3, 5):
        for interval in range(2, template.steps):
            try:
                compute = deepcache(program, template.timesteps, interval, warmup=warmup).compute
            except MaskError:
                return []
            if shares(compute) <= budget:
                found.append(compute)
                break
    return found


def _digest(recordings: Sequence[Recording]) -> str:
    """Of what the first call of each pass was given, and what the pass came to, to three digits: GPUs differ after more."""
    described = []
    for r in recordings:
        tensors = (r.outcome, *r.steps[0][0].call.tensors, *r.steps[0][0].results)
        described += [(list(t.shape), str(t.dtype), f"{t.double().abs().mean().item():.2e}") for t in tensors]
    return sha256(repr(described).encode()).hexdigest()[:16]


def _weights_sum(model: nn.Module) -> str:
    """Tells checkpoints of one architecture apart, by the sums of their parameters."""
    sums = [float(p.detach().double().sum()) for p in model.parameters() if not p.is_meta]
    return f"{sum(sums):.9e} of {len(sums)}"
