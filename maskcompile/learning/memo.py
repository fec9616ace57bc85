"""A checkpoint: results by key, so that an interrupted learning, begun again, finds what it had computed and goes on.

Learning is deterministic, so that repeating its decisions over remembered results comes to the same point, and then further.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from maskcompile.files import write_whole

FORMAT = "maskcompile learning checkpoint"


class Memo:
    """Results by key, in a JSON file where there is a path; in memory alone where there is none.

    settings: everything that the results depend on. writes: False in all but one of several processes, which share the file.
    Raises ValueError for a file that is no checkpoint or was made with other settings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any], writes: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.writes = writes
        self.results: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self.results = self._read(self.path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"{path} is no checkpoint of maskcompile.learn; give another path, or remove the file.")
        theirs = document["settings"]
        if changed := [k for k in sorted({*theirs, *self.settings}) if theirs.get(k) != self.settings.get(k)]:
            raise ValueError(
                f"the checkpoint {path} was made with another {changed[0]} ({theirs.get(changed[0])!r}, now "
                f"{self.settings.get(changed[0])!r}); learn with that again, or give another path."
            )
        results: dict[str, Any] = document["results"]
        return results

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def __getitem__(self, key: str) -> Any:
        return self.results[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """value: JSON-able."""
        self.results[key] = value
        if self.path is not None and self.writes:
            document = {"format": FORMAT, "settings": self.settings, "results": self.results}
            write_whole(self.path, json.dumps(document) + "\n")
