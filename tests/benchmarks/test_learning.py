"""The benchmark of learned masks: what its report says of rows whose figures are known, and its rivals."""

from __future__ import annotations

import numpy as np
import pytest

import maskcompile as mc
from benchmarks import learning, learning_report
from tests.denoisers import denoiser


def row(kind, reuse, psnr, budget=0.5, **more):
    figures = {"share": budget, "psnr": psnr, "psnr_spread": psnr / 10, "ssim": 0.9, "graphs": 3}
    return {"denoiser": "unet", "steps": 20, "budget": budget, "kind": kind, "reuse": reuse, "rules": [], **figures, **more}


def test_the_gain_is_over_the_best_of_the_others():
    rows = [
        row("search", "linear", 47.0),
        row("search", "hold", 46.0),  # a search too: no rival
        row("uniform", "linear", 43.5),
        row("fewer steps", "", 38.0),
        row("search", "linear", 40.0, budget=0.4),
        row("uniform", "linear", 41.0, budget=0.4),
        row("search", "linear", 30.0, budget=0.3),
        row("paper", "hold", 35.0, budget=0.3),
    ]
    said = learning_report.gains(rows)
    assert "-5.0 at 30%, -1.0 at 40%, +3.5 at 50%" in said
    assert "mean from 40% on +1.2 dB" in said
    rows.append(row("search, other noise", "linear", 46.5))
    assert learning_report.spread(rows).splitlines()[4:] == [
        "| UNet | 20 | 50% | 47.0 (4.7) | 46.5 (4.7) | 43.5 (4.3) uniform, linear |",
        "| UNet | 20 | 40% | 40.0 (4.0) | - | 41.0 (4.1) uniform, linear |",
        "| UNet | 20 | 30% | 30.0 (3.0) | - | 35.0 (3.5) paper's method |",
    ]
    cells = learning_report.table(rows, "psnr", ".1f").splitlines()[2].split(" | ")
    assert cells[1:5] == ["50%", "47.0", "-", "46.0"]


def test_what_rows_were_measured_on_is_said():
    here, there = {"hardware": "one; torch 2"}, {"hardware": "another; torch 2"}
    assert learning_report.machines([]) == "nothing is measured yet"
    assert learning_report.machines([here, here]) == "one; torch 2"
    said = "2 of 3 measurements on one; torch 2 and 1 of 3 measurements on another; torch 2"
    assert learning_report.machines([there, here, here]) == said


def test_every_method_and_rival_is_tried_once():
    found = list(learning.trials(["unet", "dit"], [20], [0.5], ablations=True))
    assert len({trial.key for trial in found}) == len(found)
    assert {trial.kind for trial in found} >= {*learning.METHODS, "uniform", "deepcache", "random", "fewer steps"}
    assert not any(trial.kind == "deepcache" and trial.denoiser == "dit" for trial in found)


@pytest.mark.parametrize("budget", [0.4, 0.8])
def test_random_masks_keep_to_the_budget(budget):
    case = denoiser("unet2d")
    args, kwargs = case.inputs(1, 999, 0)
    program = mc.trace(case.model, *args, **kwargs)
    mask = learning.random_mask(program, tuple(range(20, 0, -1)), budget, "hold", tuple(np.linspace(-5, 5, 20)))
    assert budget - 0.06 <= mc.cost(program, mask).share <= budget
