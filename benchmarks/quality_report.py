"""Tables and plot of what ``benchmarks.quality`` measured, with the speed-ups that ``benchmarks.latency`` did."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.masks import choices
from maskcompile.files import write_whole

Row = dict[str, Any]
NAMES = {"unet": "UNet", "dit": "DiT"}


def write(out: Path) -> None:
    """``quality.md`` and ``quality.png`` from ``quality.json`` and, where there is one, ``latency.json``."""
    document = json.loads((out / "quality.json").read_text())
    timed = json.loads((out / "latency.json").read_text())["rows"] if (out / "latency.json").exists() else []
    rows = merged(document["rows"])
    on_gpu = {r["setting"] for r in timed if r["added_mib"] is not None}
    settings = [r["setting"] for r in timed if r["setting"] not in on_gpu]
    setting = next((said for said in settings if re.match("50 steps.*float32, backend inductor", said)), "")
    speed = {(r["denoiser"], r["variant"]): r["over_compiled"] for r in timed if r["setting"] == setting}
    write_whole(out / "quality.md", report(document, rows, speed, setting))
    if speed:
        draw(rows, speed, out / "quality.png")


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row a sampler: Frechet distances, which are trials of their own, beside the rest."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("denoiser", "reference", "steps", "solver", "mask", "rule"))
        found[key] = found.get(key, {}) | {k: v for k, v in row.items() if k not in ("key", "frechet", "choice", "hook")}
        if isinstance(row["frechet"], float):
            found[key]["frechet"] = row["frechet"]
    return list(found.values())


def report(document: Row, rows: list[Row], speed: dict[tuple[str, str], float], setting: str) -> str:
    """The whole page as Markdown. setting: that the speeds were measured in."""
    counts = f"{document['pictures']} pictures for PSNR and SSIM, {document['frechet_pictures']} for the Frechet distance"
    parts = [
        "# Quality",
        "PSNR and SSIM of final pictures to those of the unmasked DDIM sampler with the same number of steps, from the same "
        "noise; PSNR to the limit: to DPM++ 2M at 200 steps. No solver clips its estimates. Frechet distance to the training "
        "pictures, in the features of "
        + ("Inception. " if document["features"] == "Inception" else "the bundled classifier (not Inception's). ")
        + f"{counts}. {document['setting']} Made by `python -m benchmarks.quality`. A dash: not measured.",
        "## The reuse rule",
        "Each schedule under *hold* and *linear* (and, to compare, *linear* without the log-SNR, along the step index alone, "
        "and with its reach fitted to other noise by `mc.fit_reach`).",
        rule_table(rows),
        "Gain of *linear* over *hold*, mean over the schedules of the table:",
        gain_table(rows),
        "## Fewer steps and better solvers",
        "The best mask under *linear*, its reach fitted or not, that keeps no more of the MACs than the sampler beside it "
        "(within 0.01).",
        rival_table(rows),
        "## On the way to the limit",
        "PSNR to the limit, which no mask needs to be near: a mask keeps to the pictures of its own sampler. Work: MACs in "
        "steps of the unmasked denoiser.",
        limit_table(rows),
        "## TaylorSeer's own hook",
        "On the DiT's attention and feed-forward blocks, three full steps at the start, float32, beside masks of the same "
        "interval. The hook runs in eager mode: it cannot be compiled whole.",
        hook_table(rows),
        "## Where extrapolation is hard",
        "Few steps, large gaps, a sampler that adds noise at every step (DDIM with eta = 1), and masks on DPM++ 2M. Each is "
        "compared with the same sampler without a mask.",
        hard_table(rows),
    ]
    if speed:
        parts += ["## Speed at equal quality", *equal_quality(rows, speed, setting)]
    return "\n\n".join(parts) + "\n"


def pick(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def one(rows: list[Row], name: str, **wanted: Any) -> float | None:
    """The figure ``name`` of the row that is wanted, None where it was not measured."""
    return next((row[name] for row in pick(rows, **wanted) if name in row), None)


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def main_rows(rows: list[Row]) -> list[Row]:
    """Masks of the grid of schedules under *hold*: one for each schedule, number of warm-up steps, denoiser and step count."""
    grid = {(name, choice.label) for name in NAMES for choice in choices(name)}
    counts = {(r["denoiser"], r["reference"]) for r in rows if r["mask"] is None and r["steps"] != r["reference"]}
    held = [r for r in pick(rows, solver="DDIM", rule="hold") if (r["denoiser"], r["mask"]) in grid]
    held = [r for r in held if (r["denoiser"], r["reference"]) in counts]
    order = list(NAMES)
    return sorted(held, key=lambda r: (order.index(r["denoiser"]), r["reference"], -r["share"]))


def rule_table(rows: list[Row]) -> str:
    lines = []
    for held in main_rows(rows):
        same = {name: held[name] for name in ("denoiser", "reference", "steps", "solver", "mask")}

        def figure(name: str, rule: str, same: Row = same) -> float | None:
            return one(rows, name, **same, rule=rule)

        def pair(name: str, form: str, figure: Callable[[str, str], float | None] = figure) -> str:
            return f"{shown(figure(name, 'hold'), form)} / {shown(figure(name, 'linear'), form)}"

        psnr = [figure("psnr", rule) for rule in ("hold", "linear", "linear by step", "linear fitted")]
        gain = None if psnr[0] is None or psnr[1] is None else psnr[1] - psnr[0]
        lines.append(
            [NAMES[held["denoiser"]], str(held["reference"]), held["mask"], f"{held['share']:.1%}"]
            + [shown(p, ".1f") for p in psnr]
            + [shown(gain, "+.1f"), pair("ssim", ".4f"), pair("psnr_limit", ".1f"), pair("frechet", ".3f")]
        )
    for name, total in sorted({(r["denoiser"], r["reference"]) for r in main_rows(rows)}, key=lambda k: (k[0] == "dit", k[1])):
        full = {"denoiser": name, "reference": total, "steps": total, "solver": "DDIM", "mask": None}
        limit, frechet = (
            shown(one(rows, figure, **full), form) for figure, form in (("psnr_limit", ".1f"), ("frechet", ".3f"))
        )
        lines.append([NAMES[name], str(total), "no mask", "100.0%", "", "", "", "", "", "", limit, frechet])
    head = ["denoiser", "steps", "mask", "MACs kept", "PSNR hold", "PSNR linear", "by step alone", "reach fitted", "gain dB"]
    return table([*head, "SSIM hold / linear", "PSNR to the limit hold / linear", "Frechet hold / linear"], lines)


def gain_table(rows: list[Row]) -> str:
    totals = sorted({r["reference"] for r in main_rows(rows)})
    lines = []
    for name in ("unet", "dit"):
        for warmup in (1, 4, None):
            line = [NAMES[name], "all" if warmup is None else f"warmup={warmup}"]
            for total in totals:
                held = [r for r in main_rows(rows) if r["denoiser"] == name and r["reference"] == total]
                held = [r for r in held if warmup in (None, r["warmup"])]
                gains = []
                for row in held:
                    same = {key: row[key] for key in ("denoiser", "reference", "steps", "solver", "mask")}
                    linear = one(rows, "psnr", **same, rule="linear")
                    if linear is not None:
                        gains.append(linear - row["psnr"])
                line.append(f"{mean(gains):+.1f} dB ({min(gains):+.1f} to {max(gains):+.1f})" if gains else "-")
            lines.append(line)
    return table(["denoiser", "schedules", *(f"{total} steps" for total in totals)], lines)


def rival_table(rows: list[Row]) -> str:
    lines = []
    for name in ("unet", "dit"):
        for total in sorted({r["reference"] for r in rows}):
            rivals = [r for r in pick(rows, denoiser=name, reference=total, mask=None) if r["steps"] < total]
            masked = [
                row
                for rule in ("linear", "linear fitted")
                for row in pick(rows, denoiser=name, reference=total, steps=total, solver="DDIM", rule=rule)
            ]
            for steps in sorted({r["steps"] for r in rivals}, reverse=True):
                fitting = [r for r in masked if r["share"] <= steps / total + 0.01]
                if not fitting:
                    continue
                best = max(fitting, key=lambda r: r["psnr"])
                line = [NAMES[name], str(total), f"{steps / total:.0%}", f"{best['mask']}, {best['rule']}: {best['share']:.1%}"]
                for figure, form in (("psnr", ".1f"), ("psnr_limit", ".1f"), ("frechet", ".3f")):
                    values = [best.get(figure)]
                    values += [one(rivals, figure, steps=steps, solver=s) for s in ("DDIM", "DPM++ 2M", "UniPC")]
                    line.append(" / ".join(shown(value, form) for value in values))
                lines.append([*line[:3], f"{steps} steps", *line[3:]])
    columns = "mask / DDIM / DPM++ 2M / UniPC"
    head = ["denoiser", "steps", "MACs at most", "rivals with", "the mask", f"PSNR: {columns}", f"PSNR to the limit: {columns}"]
    return table([*head, f"Frechet: {columns}"], lines)


def limit_table(rows: list[Row]) -> str:
    lines = []
    for name in NAMES:
        found = [r for r in pick(rows, denoiser=name) if "psnr_limit" in r and r["solver"] in ("DDIM", "DPM++ 2M")]
        found = [r for r in found if r["rule"] in (None, "hold", "linear") and (r["rule"] is None or r["solver"] != "DDIM")]
        found = {(r["solver"], r["steps"], r["mask"], r["rule"]): r for r in found}.values()
        for r in sorted(found, key=lambda r: r["share"] * r["reference"]):
            sampler = f"{r['solver']}, {r['steps']} steps"
            mask = f"{r['mask']}, {r['rule']}" if r["mask"] else ""
            lines.append([NAMES[name], f"{r['share'] * r['reference']:.1f}", sampler, mask, f"{r['psnr_limit']:.1f}"])
    return table(["denoiser", "work", "sampler", "mask", "PSNR to the limit"], lines)


def hook_table(rows: list[Row]) -> str:
    lines = []
    for row in sorted((r for r in rows if "hook" in str(r["rule"])), key=lambda r: (r["reference"], -r["share"], r["rule"])):
        interval = row["mask"].removeprefix("uniform(interval=").removesuffix(")")
        ours = [r for r in rows if r["denoiser"] == "dit" and r["reference"] == row["reference"] and r["solver"] == "DDIM"]
        ours = [r for r in ours if r["rule"] == "linear" and r["mask"] == f"uniform(interval={interval}, warmup=4)"]
        beside = f"{ours[0]['share']:.1%}, {ours[0]['psnr']:.1f} dB" if ours else "-"
        order = row["rule"].removeprefix("TaylorSeer hook, ")
        lines.append([str(row["reference"]), interval, order, f"{row['share']:.1%}", f"{row['psnr']:.1f}", beside])
    return table(["steps", "interval", "hook", "MACs kept", "PSNR", "uniform with warmup=4, linear"], lines)


def hard_table(rows: list[Row]) -> str:
    grid = {(r["denoiser"], r["reference"], r["solver"], r["mask"]) for r in main_rows(rows)}
    lines = []
    for held in pick(rows, rule="hold"):
        same = {name: held[name] for name in ("denoiser", "reference", "steps", "solver", "mask")}
        if tuple(same[name] for name in ("denoiser", "reference", "solver", "mask")) in grid:
            continue
        linear = one(rows, "psnr", **same, rule="linear")
        gain = None if linear is None else linear - held["psnr"]
        lines.append(
            [
                NAMES[held["denoiser"]],
                str(held["reference"]),
                held["solver"],
                held["mask"],
                f"{held['share']:.1%}",
                f"{held['psnr']:.1f}",
                shown(linear, ".1f"),
                shown(gain, "+.1f"),
            ]
        )
    lines.sort(key=lambda line: (line[0] != "UNet", line[2], int(line[1]), line[3]))
    return table(["denoiser", "steps", "sampler", "mask", "MACs kept", "PSNR hold", "PSNR linear", "gain dB"], lines)


def frontier(rows: list[Row], speed: dict[tuple[str, str], float], name: str, rule: str) -> list[tuple[float, float, str]]:
    """(speed-up, PSNR, mask) of each mask at 50 steps that was timed, by speed-up."""
    points = []
    for row in pick(rows, denoiser=name, reference=50, steps=50, solver="DDIM", rule=rule):
        if (name, f"{row['mask']}, {rule}") in speed:
            points.append((speed[name, f"{row['mask']}, {rule}"], row["psnr"], row["mask"]))
    return sorted(points)


def equal_quality(rows: list[Row], speed: dict[tuple[str, str], float], setting: str) -> list[str]:
    """For each linear mask at 50 steps, the speed-up of *hold* at its PSNR, along the line through hold's best masks."""
    lines = []
    for name in ("unet", "dit"):
        held = frontier(rows, speed, name, "hold")
        best = [p for p in held if not any(q[0] >= p[0] and q[1] > p[1] for q in held)]
        curve = sorted((p[1], p[0]) for p in best)
        for fast, psnr, mask in frontier(rows, speed, name, "linear"):
            if not curve:
                continue
            there = f"{np.interp(psnr, *zip(*curve, strict=True)):.2f}x"
            there = f"less than {curve[-1][1]:.2f}x" if psnr > curve[-1][0] else there
            there = f"more than {curve[0][1]:.2f}x" if psnr < curve[0][0] else there
            lines.append([NAMES[name], mask, f"{psnr:.1f}", f"{fast:.2f}x", there])
    return [
        f"Speed-ups over `torch.compile` of `latency.md` ({setting.rstrip('.')}); for *hold* along straight lines between its "
        "best masks.",
        table(["denoiser", "mask", "PSNR linear", "speed-up linear", "speed-up of hold at that PSNR"], lines),
    ]


def draw(rows: list[Row], speed: dict[tuple[str, str], float], path: Path) -> None:
    """PSNR over measured speed-up at 50 steps, a panel a denoiser."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    styles = {"hold": ("#7d93a8", "o", "masks, hold"), "linear": ("#c4562f", "s", "masks, linear")}
    for axes, name in zip(figure.subplots(1, 2), ("unet", "dit"), strict=True):
        for rule, (colour, marker, label) in styles.items():
            points = frontier(rows, speed, name, rule)
            if not points:
                continue
            x, y, _ = zip(*points, strict=True)
            axes.scatter(x, y, color=colour, marker=marker, s=34, zorder=3, label=label)
            best = [p for p in points if not any(q[0] >= p[0] and q[1] > p[1] for q in points)]
            axes.plot([p[0] for p in best], [p[1] for p in best], color=colour, linewidth=1.6, zorder=2)
        for solver, colour in (("DDIM", "#3f8f5b"), ("DPM++ 2M", "#8a63a8"), ("UniPC", "#b5a33c")):
            fewer = [r for r in pick(rows, denoiser=name, reference=50, solver=solver, mask=None) if r["steps"] < 50]
            fewer.sort(key=lambda r: -r["steps"])
            x, y = [50 / r["steps"] for r in fewer], [r["psnr"] for r in fewer]
            axes.plot(x, y, color=colour, linewidth=1.1, linestyle="--", marker=".", label=f"fewer steps, {solver} (counted)")
        for order, marker in ((1, "x"), (2, "+")):
            rule = f"TaylorSeer hook, order {order}"
            timed = [(speed.get((name, f"{rule}, {r['mask']}")), r["psnr"]) for r in pick(rows, denoiser=name, rule=rule)
                     if r["reference"] == 50]  # fmt: skip
            timed = sorted((x, y) for x, y in timed if x is not None)
            if timed:
                axes.plot(*zip(*timed, strict=True), color="black", marker=marker, linewidth=0.6, label=f"{rule} (eager)")
        axes.axvline(1, color="#c3cad1", linewidth=0.8, zorder=0)
        axes.set_title(f"{NAMES[name]}, 50 DDIM steps", fontsize=10)
        axes.set_xlabel("speed-up over torch.compile", fontsize=9)
        axes.grid(color="#eef1f4", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7.5, frameon=False)
    figure.axes[0].set_ylabel("PSNR to the unmasked pictures, dB", fontsize=9)
    figure.savefig(path, dpi=150)
