"""Tables and plot of what ``benchmarks.learning`` measured."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.quality_report import NAMES
from maskcompile.files import write_whole

Row = dict[str, Any]
#: (kind, reuse) -> heading, in the order of the columns
COLUMNS = {
    ("search", "linear"): "**learned**",
    ("search, reach not fitted", "linear"): "its reach not fitted",
    ("search", "hold"): "learned, hold",
    ("paper", "linear"): "paper's method, linear",
    ("paper", "hold"): "paper's method",
    ("uniform", "linear"): "uniform, linear",
    ("uniform", "hold"): "uniform (FORA)",
    ("deepcache", "linear"): "DeepCache, linear",
    ("deepcache", "hold"): "DeepCache",
    ("fewer steps", ""): "fewer steps",
    ("random", "linear"): "random, linear",
    ("random", "hold"): "random",
}
PLOTTED = {
    ("search", "linear"): ("learned", "#1f4e79", "-"),
    ("uniform", "linear"): ("uniform, linear", "#c4562f", "-"),
    ("uniform", "hold"): ("uniform (FORA)", "#c4562f", ":"),
    ("deepcache", "linear"): ("DeepCache, linear", "#8a6bb0", "-"),
    ("deepcache", "hold"): ("DeepCache", "#8a6bb0", ":"),
    ("paper", "hold"): ("paper's method", "#3f8f5b", ":"),
    ("fewer steps", ""): ("fewer steps", "#7a7f85", "-"),
}


def write(out: Path) -> None:
    """``learning.md`` and ``learning.png`` from ``learning.json``."""
    document = json.loads((out / "learning.json").read_text())
    rows = [row for row in document["rows"] if "psnr" in row]
    write_whole(out / "learning.md", report(document, rows))
    draw(rows, out / "learning.png")


def report(document: Row, rows: list[Row]) -> str:
    """The whole page as Markdown."""
    pictures = document["pictures"]
    parts = [
        "# Learned masks",
        f"PSNR in dB (and below SSIM) of {pictures['held out']} final pictures to those of the unmasked DDIM sampler from the "
        f"same noise, which learning has not seen; it learned from {pictures['learning']} others. The uniform and DeepCache "
        f"masks are the best, by {pictures['choosing']} of these very pictures, of all intervals and numbers of warm-up steps "
        "that keep at most the budget and 0.01, and at least three quarters of it. The search, but for the fit, spent "
        f"{document['passes']:g} sampling passes, half as many at 100 steps. "
        f"{document['setting']}; {machines(rows)}. "
        "Made by `python -m benchmarks.learning`. A dash: not measured, or there is none.",
        "## At a glance",
        glance(rows),
    ]
    for steps in sorted({row["steps"] for row in rows}):
        of = [row for row in rows if row["steps"] == steps and not row["rules"]]
        parts += [f"## {steps} steps", "PSNR", table(of, "psnr", ".1f"), gains(of), "SSIM", table(of, "ssim", ".4f")]
    parts += ["## Spread", spread(rows), "## What learning took", effort(rows), "## The paper's ablations", ablations(rows)]
    return "\n\n".join(parts) + "\n"


def machines(rows: list[Row]) -> str:
    """What the rows were measured on, the most first."""
    counts = Counter(row["hardware"] for row in rows).most_common()
    if len(counts) < 2:
        return counts[0][0] if counts else "nothing is measured yet"
    return " and ".join(f"{count} of {len(rows)} measurements on {name}" for name, count in counts)


def found(rows: list[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def table(rows: list[Row], figure: str, form: str) -> str:
    lines = [
        "| denoiser | budget | " + " | ".join(COLUMNS.values()) + " |",
        "| --- | --- |" + " --- |" * len(COLUMNS),
    ]
    for name, budget in sorted({(row["denoiser"], row["budget"]) for row in rows}, reverse=True):
        cells = []
        for kind, reuse in COLUMNS:
            row = found(rows, denoiser=name, budget=budget, kind=kind, reuse=reuse)
            cells.append("-" if row is None else format(row[figure], form))
        lines.append(f"| {NAMES[name]} | {budget:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def glance(rows: list[Row]) -> str:
    """Learned / the best of the others, under each rule, a line for each denoiser and number of steps."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = [
        "PSNR in dB, learned / the best of the others of at most that budget: *u*niform, *D*eepCache as a mask, the *p*aper's "
        "method, or DDIM with fewer *s*teps. Where the learned mask holds, so do the others; where it extrapolates, they may.",
        "",
        "| reuse | denoiser | steps | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |",
        "| --- | --- | --- |" + " --- |" * len(budgets),
    ]
    for reuse, name, steps in product(("linear", "hold"), ("unet", "dit"), sorted({row["steps"] for row in rows})):
        of = [row for row in rows if row["steps"] == steps and not row["rules"]]
        cells = []
        for budget in budgets:
            row = found(of, denoiser=name, budget=budget, kind="search", reuse=reuse)
            others = [] if row is None else [r for r in rivals(of, row) if reuse != "hold" or r["reuse"] in ("hold", "")]
            if row is None or not others:
                cells.append("-" if row is None else f"**{row['psnr']:.1f}**")
                continue
            best = max(others, key=lambda r: r["psnr"])
            letter = {"uniform": "u", "deepcache": "D", "paper": "p", "fewer steps": "s"}.get(best["kind"], best["kind"])
            learned, other = f"{row['psnr']:.1f}", f"{best['psnr']:.1f}"
            if learned != other:
                learned, other = (f"**{learned}**", other) if row["psnr"] > best["psnr"] else (learned, f"**{other}**")
            cells.append(f"{learned} / {other} {letter}")
        lines.append(f"| {reuse} | {NAMES[name]} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["denoiser"] != "unet", row["steps"], -row["budget"]))


def rivals(rows: list[Row], row: Row) -> list[Row]:
    """Whatever else keeps at most as much as a learned mask may: of 100 steps, no schedule keeps nearly 80%."""
    alike = [r for r in rows if (r["denoiser"], r["steps"]) == (row["denoiser"], row["steps"]) and r["budget"] <= row["budget"]]
    return [r for r in alike if not r["kind"].startswith("search") and not r["rules"]]


def gains(rows: list[Row]) -> str:
    """How far the default is above the best of the others."""
    lines = []
    for name in sorted({row["denoiser"] for row in rows}, reverse=True):
        differences: dict[float, float] = {}
        for row in (r for r in rows if r["denoiser"] == name and (r["kind"], r["reuse"]) == ("search", "linear")):
            if others := rivals(rows, row):
                differences[row["budget"]] = row["psnr"] - max(other["psnr"] for other in others)
        above = [gain for budget, gain in differences.items() if budget >= 0.4]
        if above:
            each = ", ".join(f"{gain:+.1f} at {budget:.0%}" for budget, gain in sorted(differences.items()))
            lines.append(
                f"{NAMES[name]}: the learned mask against the best of the others (any but a search) of at most that budget: "
                f"{each}; "
                f"mean from 40% on {mean(above):+.1f} dB."
            )
    return "\n\n".join(lines)


def spread(rows: list[Row]) -> str:
    """How the learned masks differ from picture to picture, and with the noise that they were learned from."""
    lines = [
        "PSNR of the learned mask, mean and standard deviation over the pictures; of a mask learned from other noise; and of "
        "the best of the others.",
        "",
        "| denoiser | steps | budget | learned | from other noise | best of the others |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in in_order(rows):
        if (row["kind"], row["reuse"]) != ("search", "linear"):
            continue
        same = {name: row[name] for name in ("denoiser", "steps", "budget")}
        others = rivals(rows, row)
        shown = [row, found(rows, **same, kind="search, other noise"), max(others, key=lambda r: r["psnr"], default=None)]
        cells = ["-" if r is None else f"{r['psnr']:.1f} ({r['psnr_spread']:.1f})" for r in shown]
        if shown[2] is not None:
            cells[2] += f" {COLUMNS.get((shown[2]['kind'], shown[2]['reuse']), shown[2]['kind'])}"
        lines.append(f"| {NAMES[row['denoiser']]} | {row['steps']} | {row['budget']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def effort(rows: list[Row]) -> str:
    """Work and time of learning."""
    lines = [
        "Work in sampling passes of the original over all pictures learned from, and processor time over that of one such pass "
        "(eager, the same batch). Scores within 0.1 of 0 or 1: the paper's method.",
        "",
        "| denoiser | steps | budget | method | rule | work | time | scores near 0 or 1 | MACs kept | graphs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in in_order(rows):
        if "passes" in row and not row["rules"]:
            near = f"{row['scores_near_0_or_1']:.0%}" if "scores_near_0_or_1" in row else "-"
            lines.append(
                f"| {NAMES[row['denoiser']]} | {row['steps']} | {row['budget']:.0%} | {row['kind']} | {row['reuse']} "
                f"| {row['passes']:.0f} | {row['passes_of_time']:.0f} | {near} | {row['share']:.1%} | {row['graphs']} |"
            )
    return "\n".join(lines)


def ablations(rows: list[Row]) -> str:
    """The paper's method without parts of it, under plain reuse, at half the MACs."""
    lines = [
        "Under plain reuse. The knowledge-guided rules are applied to the mask learned without rectification, with nothing put "
        "in the place of what they save.",
        "",
        "| denoiser | steps | method | rules applied after | MACs kept | PSNR |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda r: (r["denoiser"], r["steps"], r["kind"], len(r["rules"]))):
        if row["kind"].startswith("paper") and row["reuse"] == "hold" and row["budget"] == 0.5:
            rules = ", ".join(row["rules"]) or "-"
            lines.append(
                f"| {NAMES[row['denoiser']]} | {row['steps']} | {row['kind']} | {rules} | {row['share']:.1%} "
                f"| {row['psnr']:.1f} |"
            )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """PSNR against the share of the MACs, one panel for each denoiser (down) and number of steps (across)."""
    names = sorted({row["denoiser"] for row in rows}, reverse=True)
    steps = sorted({row["steps"] for row in rows})
    if not rows:
        return
    figure = Figure(figsize=(3.6 * len(steps) + 1.6, 2.9 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(steps), squeeze=False, sharex=True, sharey=True)
    labelled = {}
    for (down, name), (across, total) in product(enumerate(names), enumerate(steps)):
        axes = grid[down][across]
        for (kind, reuse), (label, colour, style) in PLOTTED.items():
            points = sorted(
                (row["share"], row["psnr"])
                for row in rows
                if (row["denoiser"], row["steps"], row["kind"], row["reuse"]) == (name, total, kind, reuse) and not row["rules"]
            )
            if points:
                width = 2.6 if kind == "search" else 1.2
                (labelled[label],) = axes.plot(
                    *zip(*points, strict=True), style, marker="o", markersize=1.6 * width, linewidth=width, color=colour
                )
        axes.set_title(f"{NAMES[name]}, {total} steps", fontsize=10)
        axes.grid(alpha=0.25)
    order = [label for label, _, _ in PLOTTED.values() if label in labelled]
    figure.legend([labelled[label] for label in order], order, loc="outside right center", frameon=False)
    figure.supxlabel("share of the MACs kept", fontsize=10)
    figure.supylabel("PSNR to the unmasked pictures, dB", fontsize=10)
    figure.savefig(path, dpi=150)
