"""The paper's method: learn a score for each step and block, every step by itself (arXiv 2603.19939).

A step sees what the denoiser itself returned at the step before, as its cache. One update is one forward and one backward of
the denoiser at one step, over a recorded input:

    loss = a_t ||eps_masked - eps||^2 / ||eps||^2  +  l sum_b w_b s_b  +  l m sum_b w_b s_b (1 - s_b)

with s the scores of the step, w_b the block's share of the MACs, a_t the timestep-aware scaling (the measured change of
features between steps t - 1 and t, over its mean), l the price of a MAC, which follows the budget by itself, and m the
bimodal regulariser's weight, which grows while learning. Its code is not public; what the paper leaves open is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskcompile.learning.memo import Memo
from maskcompile.learning.processes import Processes
from maskcompile.learning.recording import Recording
from maskcompile.learning.relaxed import Features, RelaxedDenoiser, recalled
from passes.knowledge import KNOWLEDGE
from passes.reuse import Rules

RELAXATIONS = ("random", "gumbel")


class Report(Protocol):
    """Is told of work done, in forwards of single steps, and, where they are known, of the share of the MACs and of the mean
    error of single steps under the masks that were drawn, as a share of the outputs' power."""

    def __call__(self, forwards: float, share: float | None = None, error: float | None = None) -> None: ...


@dataclass(frozen=True)
class Paper:
    """The paper's method and its parts, for ``learn(method=...)``.

    relaxation: "random" draws a mask from the scores at every update and hands its gradient on to them; "gumbel" blends by a
    Gumbel-Softmax sample, whose temperature falls from 1 to 0.2. scaling: the timestep-aware scaling. bimodal: largest m of
    the loss. rectification: knowledge rules applied to the learned mask (see ``maskcompile.rectify``). epochs: times that every
    step is visited, each time at the next seed; updates: of a step at a visit. learning_rate: Adam's, on the logits.
    """

    relaxation: str = "random"
    scaling: bool = True
    bimodal: float = 1.0
    rectification: tuple[str, ...] = tuple(KNOWLEDGE)
    epochs: int = 15
    updates: int = 4
    learning_rate: float = 0.25

    def __post_init__(self) -> None:
        if self.relaxation not in RELAXATIONS:
            raise ValueError(f"relaxation is one of {', '.join(map(repr, RELAXATIONS))}; got {self.relaxation!r}.")
        if unknown := [rule for rule in self.rectification if rule not in KNOWLEDGE]:
            raise ValueError(f"a rule of rectification is one of {', '.join(map(repr, KNOWLEDGE))}; got {unknown[0]!r}.")
        if self.epochs < 2 or self.updates < 1:
            raise ValueError("the scores need at least two epochs of one update each.")
        if not 0 < self.learning_rate < float("inf") or not 0 <= self.bimodal < float("inf"):
            raise ValueError(
                f"learning_rate is above 0 and bimodal 0 or more, both finite; got {self.learning_rate} and {self.bimodal}."
            )


@dataclass
class _State:
    """Logits of the scores and Adam's moments, float64 [steps, blocks] each; price: l of the loss."""

    logits: NDArray[np.float64]
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    price: float = 0.0

    @property
    def scores(self) -> NDArray[np.float64]:
        return 1 / (1 + np.exp(-self.logits))


@dataclass(frozen=True)
class Target:
    """What the scores are for. weights: float64 [blocks], each block's share of a step's MACs. floor: share of the MACs that
    always run. budget: share to keep. rules: of reuse."""

    weights: NDArray[np.float64]
    floor: float
    budget: float
    rules: Rules

    def share(self, scores: NDArray[np.float64]) -> float:
        """Share of the MACs that scores [steps, blocks] stand for."""
        return self.floor + float((scores[1:] * self.weights).sum()) / len(scores)


def learn_scores(
    relaxed: RelaxedDenoiser,
    recordings: Sequence[Recording],
    target: Target,
    options: Paper,
    memo: Memo,
    processes: Processes,
    report: Report,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Scores float64 [steps, blocks] in 0..1; those of the first step, which computes everything, are 1.

    Raises FloatingPointError with the step at which the loss is not finite. A killed run goes on at the last finished epoch.
    """
    steps, blocks = len(recordings[0].steps), len(target.weights)
    scaling = _scaling(relaxed, recordings[0], memo, report) if options.scaling else np.ones(steps)
    state = _State(np.zeros((steps, blocks)), np.zeros((steps, blocks)), np.zeros((steps, blocks)))
    own = processes.stretch(range(1, steps))
    for epoch in range(options.epochs):
        key = f"epoch {epoch}"
        if key in memo:
            saved = memo[key]
            logits, first, second = (np.asarray(saved[name]) for name in ("logits", "first", "second"))
            state = _State(logits, first, second, saved["price"])
        else:
            recording = recordings[epoch % len(recordings)]
            visited = _epoch(relaxed, recording, own, target, scaling, state, options, epoch, seed, report)
            steepness = _merge(processes.gather(visited), state)
            if epoch == 0:  # at this price the loss is as steep in the MACs as it is in the fidelity
                ratio = steepness / target.weights
                state.price = float(np.median(ratio[ratio > 0])) if (ratio > 0).any() else 1.0
            else:
                state.price *= float(np.clip((target.share(state.scores) / target.budget) ** 2, 0.5, 2.0))
            memo[key] = {name: getattr(state, name).tolist() for name in ("logits", "first", "second")} | {"price": state.price}
        report(0.0, target.share(state.scores))
    scores = state.scores
    scores[0] = 1.0
    return scores


def converged(scores: NDArray[np.float64]) -> dict[str, object]:
    """The histogram of the scores after the first step in tenths, and the fraction within 0.1 of 0 or 1."""
    counts, _ = np.histogram(scores[1:], bins=10, range=(0.0, 1.0))
    near = float(((scores[1:] <= 0.1) | (scores[1:] >= 0.9)).mean()) if scores[1:].size else 1.0
    return {"score_histogram": counts.tolist(), "scores_near_0_or_1": round(near, 4)}


_Row = tuple[list[float], list[float], list[float], list[float]]


def _epoch(
    relaxed: RelaxedDenoiser,
    recording: Recording,
    own: Sequence[int],
    target: Target,
    scaling: NDArray[np.float64],
    state: _State,
    options: Paper,
    epoch: int,
    seed: int,
    report: Report,
) -> dict[int, _Row]:
    """step -> (logits, first moments, second moments, steepness of the fidelity), for the steps ``own``, rising."""
    rows: dict[int, _Row] = {}
    kept: dict[int, Features] = {}
    errors: list[float] = []
    progress, begun = epoch / max(1, options.epochs - 1), recording.begun
    for step in own:
        calls = recording.steps[step]
        for at in (step - 2, step - 1):  # what is not there yet: at the start of a stretch
            if at >= 0 and at not in kept:
                kept[at] = relaxed.observe(recording.steps[at])
                report(1.0)
        ran = [[at for at in (step - 2, step - 1) if at >= 0]] * len(relaxed.blocks)
        cached = recalled(relaxed.blocks, kept, ran, step, begun[step], target.rules)
        logits, first, second = state.logits[step].copy(), state.first[step].copy(), state.second[step].copy()
        steepness = np.zeros_like(logits)
        for update in range(options.updates):
            (number,) = np.random.SeedSequence([seed, epoch, step, update]).generate_state(1)
            generator = torch.Generator().manual_seed(int(number))
            drawn, slope = _draw(torch.from_numpy(logits), options.relaxation, progress, generator)
            device = calls[0].call.tensors[0].device
            error, gradient = relaxed.error(calls, cached, drawn.float().to(device))
            if not (error.isfinite() and gradient.isfinite().all()):
                raise FloatingPointError(f"the loss is not finite at step {step} (timestep {recording.timesteps[step]:g}).")
            errors.append(float(error))
            scores = 1 / (1 + np.exp(-logits))
            fidelity = scaling[step] * gradient.double().cpu().numpy()
            cost = state.price * target.weights * (1 + options.bimodal * progress * (1 - 2 * scores))
            total = fidelity * slope.numpy() + cost * scores * (1 - scores)
            count = epoch * options.updates + update + 1
            first = 0.9 * first + 0.1 * total
            second = 0.99 * second + 0.01 * total**2
            change = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.99**count)) + 1e-12)
            logits = logits - options.learning_rate * change
            steepness += np.abs(fidelity) / options.updates
            report(3.0)
        rows[step] = (logits.tolist(), first.tolist(), second.tolist(), steepness.tolist())
        kept = {at: features for at, features in kept.items() if at >= step - 1}
    if errors:
        report(0.0, error=float(np.mean(errors)))
    return rows


def _merge(rows: dict[int, _Row], state: _State) -> NDArray[np.float64]:
    """Take over the rows of all processes; float64 [steps visited, blocks], how steep the fidelity was."""
    for step, (logits, first, second, _) in rows.items():
        state.logits[step], state.first[step], state.second[step] = logits, first, second
    return np.array([rows[step][3] for step in sorted(rows)])


def _draw(logits: Tensor, relaxation: str, progress: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(scores to run with, their derivative in the logits), float64 [blocks] each."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    scores = logits.sigmoid()
    if relaxation == "random":
        return (uniform < scores).double(), scores * (1 - scores)
    temperature = 0.2**progress
    soft = ((logits + uniform.log() - (1 - uniform).log()) / temperature).sigmoid()
    return soft, soft * (1 - soft) / temperature


def _scaling(relaxed: RelaxedDenoiser, recording: Recording, memo: Memo, report: Report) -> NDArray[np.float64]:
    """a_t: the relative change of the blocks' outputs from the step before, over its mean; 1 where a run begins."""
    if "scaling" not in memo:
        changes, before, begun = [], None, recording.begun
        for step, calls in enumerate(recording.steps):
            features = relaxed.observe(calls)[0]
            if before is not None and begun[step][0] < step:
                parts = [((features[s] - before[s]).norm() / features[s].norm().clamp_min(1e-20)).item() for s in features]
                changes.append(float(np.mean(parts)))
            else:
                changes.append(np.nan)
            before = features
            report(1.0)
        mean = float(np.nanmean(changes)) if not np.isnan(changes).all() else 1.0
        memo["scaling"] = [1.0 if np.isnan(change) else change / max(mean, 1e-20) for change in changes]
    return np.asarray(memo["scaling"])
