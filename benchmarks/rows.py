"""The rows of a long benchmark, in a JSON file that it goes on with where it was stopped.

Several processes may add to one file at once, each with trials of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from maskcompile.files import write_whole


def opened(path: Path, settings: dict[str, Any], fresh: bool) -> set[str]:
    """Keys of the rows that are there; begins the file where there is none, or ``fresh``.

    Raises:
        SystemExit: the rows were made with other settings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh or not path.exists():
        write_whole(path, json.dumps({**settings, "rows": []}, indent=1) + "\n")
    known = json.loads(path.read_text())
    differing = [name for name, value in settings.items() if known.get(name) != value]
    if differing:
        raise SystemExit(f"{path} was made with another {', '.join(differing)}; give --fresh or another --out.")
    return {row["key"] for row in known["rows"]}


def add(path: Path, row: dict[str, Any]) -> None:
    """Append a row, if its key is not there."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        document = json.loads(path.read_text())
        if row["key"] not in {known["key"] for known in document["rows"]}:
            document["rows"].append(row)
            write_whole(path, json.dumps(document, indent=1) + "\n")
    finally:
        os.close(folder)
