"""Tables and plot of ``benchmarks.quality``."""

from pathlib import Path


def write(out: Path) -> None:
    pass
