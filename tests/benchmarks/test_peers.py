"""Other caches: each runs what its schedule says, counted by hooks on leaf modules, and leaves the denoiser as it was."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import maskcompile as mc
from benchmarks import peers, rivals
from benchmarks.cases import case
from benchmarks.peers import (
    LIKE,
    ORIGINAL,
    Setup,
    Variant,
    best_of_ways,
    compilations,
    differing,
    document,
    eager_results,
    installed,
    kept_bytes,
    label,
    macs,
    measure,
    nearest,
    our_mask,
    ready_to_run,
    table,
    traced,
    tuned,
)
from benchmarks.rivals import BLOCKS, RIVALS, evenly
from benchmarks.timing import Timing, hardware

STEPS = 6
#: what the caption says of a file of results
SETTINGS = ("steps", "device", "dtype", "backend", "repeats")
#: static rival -> a setting, and the steps at which it computes everything
STATIC = {
    "deepcache": (2, {0, 2, 4}),
    "smoothcache": (2, {0, 3}),
    "cache-dit static": (2, {0, 3}),
    "taylorseer": (3, {0, 2, 5}),  # counts its interval from the second step after its warm-up, here of one step
    "pab": (2, {0, 2, 4}),
}
DYNAMIC = [name for name, rival in RIVALS.items() if rival.settings is None]
pairs = [
    pytest.param(name, denoiser, id=f"{name}-{denoiser}", marks=pytest.mark.skipif(rival.missing, reason="not installed"))
    for name, rival in RIVALS.items()
    for denoiser in rival.denoisers
]


@cache
def small(name):
    return case(name, STEPS, batch=1)


@contextmanager
def recorded(of):
    """Yields a function that makes a run: for each step the linear and convolution layers that ran, the MACs, the output."""
    layers = {n: m for n, m in of.denoiser.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    running = []

    def recording(name, forward):
        def forward_and_say(*args, **kwargs):
            running.append(name)
            return forward(*args, **kwargs)

        return forward_and_say

    for name, layer in layers.items():  # what caches put around a layer is then outside of this
        layer.forward = recording(name, layer.forward)

    def a_run(counting=True):
        steps = []
        with torch.no_grad():
            for args, kwargs in of.calls:
                running.clear()
                with FlopCounterMode(display=False) if counting else nullcontext() as counter:
                    output = of.denoiser(*args, **kwargs)[0]
                steps.append((set(running), counter.get_total_flops() // 2 if counting else None, output))
        return steps

    try:
        yield a_run
    finally:
        for layer in layers.values():
            del layer.forward


@cache
def of_the_original(denoiser):
    """Steps of its run."""
    with recorded(small(denoiser)) as a_run:
        return a_run()


def cached_runs(name, denoiser, settings, again=False):
    """Steps of the original's run, and of a run for each setting, and of another, uncounted, after a restart.

    Checked: after each setting, and after an interrupt, the denoiser is as it was found.
    """
    of = small(denoiser)

    def attributes():
        return [(path, module, sorted(vars(module)), module.forward) for path, module in of.denoiser.named_modules()]

    before, original, runs = attributes(), of_the_original(denoiser), []
    with recorded(of) as a_run:
        within = attributes()
        for setting in settings:
            with RIVALS[name].install(of, setting) as restart:
                restart()
                runs.append(a_run())
                if again:
                    restart()
                    runs.append(a_run(counting=False))
            assert attributes() == within
        with pytest.raises(KeyboardInterrupt), RIVALS[name].install(of, settings[-1]):
            raise KeyboardInterrupt
        assert attributes() == within
        for (layers, _, output), (layers_again, _, output_again) in zip(original, a_run(counting=False), strict=True):
            assert layers_again == layers
            assert torch.equal(output_again, output)
    assert attributes() == before
    return original, runs


def skippable(name, denoiser):
    """A pattern of the layers that a step which reuses skips, as the rival's documentation says."""
    if name == "deepcache":  # all but the way in, the outermost resnet of the way out, and the result
        return r"mid_block\..*|down_blocks\.[12]\..*|up_blocks\.[01]\..*"
    if name.startswith("cache-dit"):  # all blocks but the first
        return r"transformer_blocks\.[1-9]\..*|single_transformer_blocks\..*"
    if name == "pab":
        return r".*\.attn[12]?\..*"
    if name == "smoothcache" and denoiser == "sd":
        return r".*\.transformer_blocks\.\d+\.(attn1|attn2|ff)\..*"
    return rf"({BLOCKS[denoiser]})(\..*)?"


@pytest.mark.parametrize(("name", "denoiser"), [pair for pair in pairs if pair.values[0] in STATIC])
def test_a_static_cache_computes_at_the_steps_it_says(name, denoiser):
    setting, full = STATIC[name]
    original, runs = cached_runs(name, denoiser, [setting], again=True)  # a run after a restart is as the first one
    for cached in runs:
        for step, ((layers, whole, expected), (ran, cost, output)) in enumerate(zip(original, cached, strict=True)):
            skipped = {layer for layer in layers if re.fullmatch(skippable(name, denoiser), layer)}
            assert skipped
            assert torch.equal(output, expected) == (step in full), step
            if cached is runs[0]:
                assert (cost == whole) == (step in full), step
                assert cost <= whole
            if step in full:
                assert ran == layers, step
            elif name == "deepcache":  # and part of the outermost level
                assert skipped <= layers - ran, step
            else:
                assert layers - ran == skipped, step
    assert len({cost for step, (_, cost, _) in enumerate(runs[0]) if step not in full}) == 1
    if denoiser == "dit":
        assert macs(small(denoiser), Variant(name, setting)) == sum(cost for _, cost, _ in runs[0])


@pytest.mark.parametrize(("name", "denoiser"), [pair for pair in pairs if pair.values[0] in DYNAMIC])
def test_a_threshold_decides_how_many_steps_are_computed(name, denoiser):
    original, runs = cached_runs(name, denoiser, [1e-6, 0.999])
    whole, low, high = (sum(cost for _, cost, _ in steps) for steps in (original, *runs))
    assert low == whole
    assert high < 0.8 * whole
    assert any(not torch.equal(output, expected) for (_, _, output), (_, _, expected) in zip(runs[1], original, strict=True))


@pytest.mark.parametrize("method", ["linear", "attention"])
def test_our_share_counted_is_the_one_that_the_plans_say(method):
    of, setting = small("dit"), STATIC["pab"][0]
    share = macs(of, Variant(method, setting)) / sum(cost for _, cost, _ in of_the_original("dit"))
    assert share == pytest.approx(mc.cost(traced(of, method), our_mask(of, method, setting)).share, rel=1e-6)


@pytest.mark.parametrize("method", LIKE)
@pytest.mark.parametrize("name", ["dit", "unet", "sd", "flux"])
def test_ours_does_what_its_rival_does(name, method):
    """The same MACs and, but for rounding, the same outputs; of U-Nets ours drops the samplers between levels, which nothing reads."""
    if name not in RIVALS[LIKE[method]].denoisers or RIVALS[LIKE[method]].missing:
        pytest.skip("not installed, or not for this denoiser")
    of, rival = small(name), Variant(LIKE[method], STATIC[LIKE[method]][0])
    ours = Variant(method, rival.setting)
    assert macs(of, rival) < macs(of, Variant(ORIGINAL))
    if method == "taylor" and name in ("unet", "sd"):
        assert macs(of, ours) < macs(of, rival)
    else:
        assert macs(of, ours) == macs(of, rival)
    for output, expected in zip(eager_results(of, ours), eager_results(of, rival), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_evenly():
    assert evenly(6, 2) == [1, 0, 0, 1, 0, 0]
    assert evenly(5, 5) == [1] * 5
    for steps in range(1, 12):
        for full in range(1, steps + 1):
            chosen = evenly(steps, full)
            assert sum(chosen) == full
            assert chosen[0] == 1
            gaps = np.diff([*np.flatnonzero(chosen), steps])
            assert gaps.max() - gaps.min() <= 1


def test_nearest():
    asked = []

    def rising(setting):
        asked.append(setting)
        return setting / 100

    assert nearest(rising, range(1, 101), 0.374) == 37
    assert len(asked) < 12
    assert nearest(lambda setting: 1 / setting, range(2, 6), 0.3) == 3
    assert nearest(lambda setting: 1.0, (0.1, 0.2, 0.3), 0.5) in (0.1, 0.2, 0.3)


@pytest.mark.skipif(RIVALS["smoothcache"].missing, reason="not installed")
def test_a_rival_is_tuned_to_the_share():
    of = small("dit")
    assert tuned(of, of, "smoothcache", 0.5) == 3  # of six steps


def test_what_is_kept_between_steps():
    of = small("dit")
    assert kept_bytes(of, of.denoiser) == 0
    with installed(of, Variant("hold")) as (fast, _):
        peak = mc.cost(traced(of, "hold"), our_mask(of, "hold", 0)).peak_cache_bytes
        assert 0 <= kept_bytes(of, fast) - peak < 1024  # and the timesteps
    if not RIVALS["smoothcache"].missing:
        with installed(of, Variant("smoothcache", 3)) as (denoiser, restart):
            restart()
            # one tensor for each of 16 blocks: 64 tokens of 192 numbers
            assert kept_bytes(of, denoiser) == 16 * 64 * 192 * 4


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "OURS", {"hold": "maskcompile"})
    monkeypatch.setattr(peers, "case", lambda name, *_: small(name))
    found = peers.describe(Setup("dit", STEPS, 1, "cpu", "float32", "eager"))
    missing = [row for row in found if "error" in row]
    assert [row["method"] for row in missing] == [name for name, rival in RIVALS.items() if "dit" in rival.denoisers]
    text = table([{"denoiser": "dit", "variants": missing}])
    assert "SmoothCache, eager, not run: SmoothCache is not installed" in text


def test_all_of_it():
    """In processes, uncompiled. Of three steps the second is held: TaylorSeer has seen one step then, and holds as ours does."""
    result = measure(Setup("dit", 3, 1, "cpu", "float32", "eager", ("taylorseer",)), repeats=1, jobs=2, patience=300)
    found = {(row["method"], row["compiled"]): row for row in result["variants"]}
    asked = [(ORIGINAL, ""), (ORIGINAL, "default"), ("hold", "default"), ("taylorseer", ""), ("taylorseer", "default")]
    assert list(found) == asked
    assert not any("error" in row for row in found.values())
    assert [found[key]["how"] for key in asked[:4]] == ["eager", "fullgraph", "regions", "eager"]
    ours, rival = found["hold", "default"], found["taylorseer", "default"]
    assert rival["how"] in ("graph breaks", "blocks")  # and the other ways are named
    assert [attempt.partition(":")[0] for attempt in rival["attempts"]] == [
        way for way in ("fullgraph", "graph breaks", "blocks") if way != rival["how"]
    ]
    assert rival["setting"] == 2
    assert rival["share"] == pytest.approx(ours["share"])
    assert rival["psnr"] == pytest.approx(ours["psnr"], abs=1e-3)
    for row in (ours, rival):
        assert row["realised_share"] == pytest.approx(row["over_compiled"] * row["share"])
    text = document({"rows": [{"denoiser": "dit", "pictures": 1, **result}], **dict.fromkeys(SETTINGS, "")})
    assert f"TaylorSeer hook, order 1, interval 2 | {rival['how']} | {rival['share']:.1%} |" in text
    assert hardware() in text


def test_machines_have_tables_of_their_own():
    row = {"method": ORIGINAL, "compiled": "", "how": "eager", "over_eager": 1.0, "over_compiled": 0.5}
    """As has what was measured beside other methods."""
    row = {**row, "pictures": 2, "timed": "so"}
    machines = [
        ("unet", "one machine", ["pab"]),
        ("dit", "another", ["pab"]),
        ("sd", "one machine", ["pab"]),
        ("sd", "one machine", []),
    ]
    results = [{**row, "denoiser": n, "hardware": h, "methods": m, "variants": [row]} for n, h, m in machines]
    found = document({"rows": results, **dict.fromkeys(SETTINGS, "")}).split("| denoiser |")[1:]
    assert [[f"| {name} |" in table for name in ("unet", "sd", "dit")] for table in found] == [
        [True, True, False], [False, False, True], [False, True, False]
    ]  # fmt: skip


def test_a_wrong_result_of_ours_is_rejected(monkeypatch):
    of, variant, right = small("dit"), Variant("hold", compiled="default", how="regions"), peers.optimised

    def optimised(of, variant, backend, **options):
        fast = right(of, variant, "eager")

        def wrong(*args, **kwargs):
            output = fast(*args, **kwargs)[0]
            return (output + 0.02 * output.abs().max(),)

        wrong.reset = fast.reset
        return wrong if backend == "wrong" else fast

    monkeypatch.setattr(peers, "optimised", optimised)
    with ExitStack() as stack:
        _, _, said = ready_to_run(of, Setup("dit", STEPS, 1, "cpu", "float32", "eager"), variant, stack)
        assert said["note"] is None
        with pytest.raises(ValueError, match=r"^its results are 0\.0[12]\d* of the largest number away"):
            ready_to_run(of, Setup("dit", STEPS, 1, "cpu", "float32", "wrong"), variant, stack)


def test_only_what_decides_by_content_may_differ():
    expected = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])]
    near, far, broken = ([expected[0], expected[1] + off] for off in (0.019, 0.1, float("nan")))
    for method in (ORIGINAL, "hold", *RIVALS):
        assert differing(Variant(method), near, expected) is None
        with pytest.raises(ValueError, match="nan of the largest number"):
            differing(Variant(method), broken, expected)
        if method in DYNAMIC:
            assert "0.05 of the largest number away" in differing(Variant(method), far, expected)
        else:
            with pytest.raises(ValueError, match=r"0\.05 of the largest number away"):
                differing(Variant(method), far, expected)


def test_the_best_of_the_ways_is_the_row():
    said = [(Variant(ORIGINAL), {}), (Variant(ORIGINAL, 0, "default", "fullgraph"), {})]
    said += [(Variant("fbc", 0.1, "default", how), {}) for how in ("graph breaks", "blocks")]
    said[-1][1]["note"] = "its results differ"
    said += [(Variant("fbc", 0.1, "default", "fullgraph"), {"error": "Unsupported"}), (Variant("fbc", 0.1), {"error": "none"})]
    seconds = {said[0][0]: (8.0, 8.0), said[1][0]: (4.0, 4.0), said[2][0]: (4.0, 2.0), said[3][0]: (1.0, 2.0)}
    times = {variant.label: Timing(taken) for variant, taken in seconds.items()}
    methods = {ORIGINAL: {"method": ORIGINAL, "share": 1.0}, "fbc": {"method": "fbc", "share": 0.5, "setting": 0.1}}
    _, original, rival, failed = best_of_ways(10, methods, said, times)
    assert (original["over_eager"], original["over_compiled"], original["realised_share"]) == (2.0, 1.0, None)
    assert (rival["how"], rival["ms"], rival["over_compiled"], rival["realised_share"]) == ("blocks", 150.0, 3.0, 1.5)
    assert rival["attempts"] == [
        "fullgraph: Unsupported", "graph breaks: slower, 300.0 ms a step (spread 67%)", "blocks: its results differ"
    ]  # fmt: skip
    assert failed["error"] == "eager: none"
    with pytest.raises(RuntimeError, match="the original did not run: no memory"):
        best_of_ways(10, methods, [(Variant(ORIGINAL), {"error": "no memory"})], {})


def test_cuda_graphs_are_compared_with_cuda_graphs():
    gpu, cpu, eager = (Setup("dit", 2, 1, *where) for where in (
        ("cuda", "bfloat16", "inductor"), ("cpu", "float32", "inductor"), ("cuda", "bfloat16", "eager")
    ))  # fmt: skip
    assert compilations(gpu, ORIGINAL) == ("", "default", "reduce-overhead", "max-autotune")
    assert compilations(gpu, "hold") == ("default", "reduce-overhead", "max-autotune")
    assert compilations(gpu, "taylorseer") == ("", "default", "reduce-overhead")
    for setup in (cpu, eager):
        assert [compilations(setup, m) for m in (ORIGINAL, "hold", "fbc")] == [("", "default"), ("default",), ("", "default")]


def test_the_table_names_what_ran():
    assert label("dit", {"method": "hold"}) == "**maskcompile**, uniform(interval=2)"
    assert label("dit", {"method": "taylorseer", "setting": 3}) == "TaylorSeer hook, order 1, interval 3"
    assert label("dit", {"method": "smoothcache", "setting": 7}) == "SmoothCache, 7 full steps"
    assert label("dit", {"method": "fbc", "setting": 0.25}) == "FirstBlockCache hook, threshold 0.25"
