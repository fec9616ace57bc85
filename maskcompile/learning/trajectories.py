"""Which calls of a recorded pass go on with which, as they will under a mask: see ``maskcompile.runs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from maskcompile.captures import capture_once
from maskcompile.conditioning import Conditioning
from maskcompile.learning.recording import Recording
from maskcompile.program import Program
from maskcompile.runs import Runs, Trajectory, Where, advance, commit, current
from maskcompile.signature import Key
from passes.capture import first_parameter
from passes.dependencies import Slots, slot_dependencies


@dataclass(frozen=True)
class Span:
    """Calls of one signature that belong to trajectories which began at one step.

    slots: the denoiser at this signature. calls: int [steps], how many there are at each, none before ``begun``.
    """

    slots: Slots
    begun: int
    calls: NDArray[np.int64]


def begun(model: nn.Module, recording: Recording) -> tuple[tuple[int, ...], ...]:
    """For each call of each step, the step at which its trajectory began: there it computes whatever it needs."""
    runs, steps = Runs(), len(recording.steps)
    found = []
    for step, calls in enumerate(recording.steps):
        starts: list[int] = []
        for call in (recorded.call for recorded in calls):
            runs = advance(runs, Where(step, float(step), float("nan"), None))
            trajectory = current(runs, call.key, call.tensors)
            if trajectory is None:
                sample = first_parameter(model, call.args, call.kwargs)
                places = [place for place in range(len(call.tensors)) if place != sample]
                course = tuple(range(step, steps))
                trajectory = Trajectory(call.key, None, course, Conditioning.of(call.tensors, places))
            start = trajectory.course[0]
            assert start is not None  # the mask has every step
            starts.append(start)
            runs = commit(runs, trajectory.moved(call.tensors, ()))
        found.append(tuple(starts))
    return tuple(found)


def spans(model: nn.Module, program: Program, recording: Recording, starts: Sequence[Sequence[int]]) -> list[Span]:
    """The calls of a recorded pass, those alike together. starts: what ``begun`` says."""
    slots: dict[Key, Slots] = {recording.steps[0][0].call.key: program.slots}
    counted: dict[tuple[Key, int], NDArray[np.int64]] = {}
    for step, calls in enumerate(recording.steps):
        for recorded, start in zip(calls, starts[step], strict=True):
            key = recorded.call.key
            if key not in slots:
                slots[key] = slot_dependencies(capture_once(model, recorded.call, program.names).capture, program.names)
            counted.setdefault((key, start), np.zeros(len(recording.steps), dtype=np.int64))[step] += 1
    return [Span(slots[key], start, calls) for (key, start), calls in counted.items()]
