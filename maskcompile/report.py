"""What ``fast.report()`` returns; ``print`` shows it readably."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SignatureReport:
    """For one input signature: a whole run's MACs without and with the mask, cache memory at its peak, graphs, seconds.

    held_cache_bytes: what the peak would be if every block were held. extrapolated: numbers that a run extrapolates, a
    multiply-add each, which the MACs do not count. unmerged_macs: with all the graphs that the mask takes (``max_graphs``).
    regions: different ones that the graphs made so far consist of, None for whole graphs. compile_seconds: of each graph made
    and called so far, its compilation and first call. any_batch: whether the capture and what is compiled of it serve other
    batches too. alone: why it does not, where that was tried.
    """

    inputs: str
    full_macs: int
    macs: int
    unmerged_macs: int
    peak_cache_bytes: int
    held_cache_bytes: int
    extrapolated: int
    graphs: int
    regions: int | None
    capture_seconds: float
    compile_seconds: tuple[float, ...]
    any_batch: bool = False
    alone: str | None = None

    @property
    def share(self) -> float:
        """MACs with the mask as a share of those without."""
        return self.macs / self.full_macs if self.full_macs else 1.0


@dataclass(frozen=True)
class Report:
    """The state of an optimised denoiser.

    blocks, steps: of the mask. uncaptured: (inputs, reason) where there is no graph, and modules are skipped in eager PyTorch,
    so that nothing is compiled and MACs are not known. calls: since the mask was set. reusing_calls: those that reused any
    block. unknown_timesteps: calls at a timestep that the mask does not know. skips: times that a run went past steps of the
    mask. recaptures: times that weights, modules or settings were found replaced. recorded: CUDA graphs. arena_bytes: of the
    inputs and caches that they work on. not_recorded: why one could not be. cache_bytes: held now by runs in progress.
    """

    denoiser: str
    backend: str
    blocks: int
    steps: int
    signatures: tuple[SignatureReport, ...]
    uncaptured: tuple[tuple[str, str], ...]
    calls: int
    reusing_calls: int
    unknown_timesteps: int
    skips: int
    recaptures: int
    recorded: int
    arena_bytes: int
    not_recorded: str | None
    cache_bytes: int

    def __str__(self) -> str:
        lines = [f"{self.denoiser}: mask of {self.steps} steps x {self.blocks} blocks, backend {self.backend}"]
        if not self.signatures and not self.uncaptured:
            lines.append("  not captured yet: the first call, or warmup(), captures and compiles")
        for s in self.signatures:
            speedup = s.full_macs / s.macs if s.macs else float("inf")
            lines += [
                f"  inputs {s.inputs}",
                f"    MACs a run   {s.full_macs / 1e9:.2f}G -> {s.macs / 1e9:.2f}G "
                f"({s.share:.1%}, at most {speedup:.2f}x faster)",
                f"    cache        {s.peak_cache_bytes / 2**20:.2f} MiB at its peak",
                *(
                    [
                        f"    extrapolate  {s.extrapolated / 1e6:.1f}M numbers a run, a multiply-add each; "
                        f"the cache would be {s.held_cache_bytes / 2**20:.2f} MiB if all were held"
                    ]
                    if s.extrapolated
                    else []
                ),
                f"    graphs       {s.graphs} for a whole run, {len(s.compile_seconds)} "
                + (f"made of {s.regions} different regions" if s.regions is not None else "compiled")
                + f" in {sum(s.compile_seconds):.1f} s after {s.capture_seconds:.1f} s of capture",
                *(["    batch        any: what is captured and compiled serves others too"] if s.any_batch else []),
                *([f"    batch        this one alone: {s.alone}"] if s.alone else []),
                *(
                    [f"    merged       adds {s.macs / s.unmerged_macs - 1:.1%} to the MACs"]
                    if s.macs > s.unmerged_macs
                    else []
                ),
            ]
        for inputs, reason in self.uncaptured:
            lines += [f"  inputs {inputs}", f"    NOT COMPILED blocks are skipped module by module, in eager PyTorch: {reason}"]
        lines.append(f"  calls          {self.calls}, of which {self.reusing_calls} reused at least one block")
        if self.unknown_timesteps:
            lines.append(
                f"  NOT IN THE MASK {self.unknown_timesteps} calls had a timestep the mask does not know: computed in full"
            )
        if self.skips:
            lines.append(f"  SKIPPED STEPS  {self.skips} times; the step after a skip computes more than its row of the mask")
        if self.recaptures:
            lines.append(f"  CAPTURED AGAIN {self.recaptures} times: weights, modules or settings had been replaced")
        if self.recorded:
            lines.append(
                f"  CUDA graphs    {self.recorded} recorded, on {self.arena_bytes / 2**20:.2f} MiB of inputs and cache"
            )
        if self.not_recorded:
            lines.append(f"  NOT RECORDED   as a CUDA graph: {self.not_recorded}")
        lines.append(f"  held now       {self.cache_bytes / 2**20:.2f} MiB")
        return "\n".join(lines)
