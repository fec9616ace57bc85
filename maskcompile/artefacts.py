"""Keep what was captured, and compiled of regions, in a file, so that another process need not do it again.

One zip archive: ``manifest.json``, which also says how many files there are; under ``captures/`` the captured graphs (JSON,
safetensors); under ``regions/`` torch's own artefact of each region (``torch._inductor.CompiledArtifact``); under ``kernels/``
the machine code for the CPU, which torch's artefacts leave out.
Compiled code runs with your rights and torch's artefacts hold pickles: load only files that you trust as you would a program.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch._inductor import config, cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.standalone_compile import CompiledArtifact

FORMAT = 2


def save_artefacts(path: str | os.PathLike[str], captures: Mapping[str, bytes], regions: Mapping[str, bytes]) -> None:
    """Write artefacts, by name, whole or not at all."""
    target = Path(path)
    kernels = _loaded_kernels()
    manifest = {"format": FORMAT, "files": len(captures) + len(regions) + len(kernels)}
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".partial")
    os.close(handle)
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("manifest.json", json.dumps({**manifest, **_surroundings(), **_vector_instructions()}, indent=1))
            for folder, artefacts in (("captures", captures), ("regions", regions)):
                for name, content in artefacts.items():
                    archive.writestr(f"{folder}/{name}", content)
            for kernel in kernels:
                archive.write(kernel, f"kernels/{kernel.relative_to(os.path.realpath(cache_dir())).as_posix()}")
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def load_artefacts(path: str | os.PathLike[str]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(captures, regions) by name; none, and a warning, from a file that is not one or was made elsewhere.

    Machine code is put where Inductor looks for it, unless there is some already.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read("manifest.json"))
            if not isinstance(manifest, dict) or manifest.pop("format", None) != FORMAT:
                raise ValueError("its format is unknown")
            for look in (_surroundings, lambda: _vector_instructions(manifest.get("vector instructions"))):
                ours = look()
                if differing := [name for name in ours if manifest.get(name) != ours[name]]:
                    name = differing[0]
                    raise ValueError(f"it was made with {name} {manifest.get(name)}, here it is {ours[name]}")
            names = [name for name in archive.namelist() if name != "manifest.json"]
            if len(names) != manifest.get("files"):
                raise zipfile.BadZipFile
            kept = {name: archive.read(name) for name in names}
    except (OSError, ValueError) as error:
        reason: object = error
    except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, NotImplementedError, EOFError):
        reason = "it is no file of save_compiled, or damaged"
    else:
        reason = None
    if reason is not None:
        warnings.warn(f"{os.fspath(path)!r} is not used, and everything compiled afresh: {reason}.", stacklevel=3)
        return {}, {}
    found: dict[str, dict[str, bytes]] = {"captures": {}, "regions": {}}
    for name, content in kept.items():
        folder, _, rest = name.partition("/")
        if folder in found:
            found[folder][rest] = content
        elif folder == "kernels" and ".." not in PurePosixPath(rest).parts and not PurePosixPath(rest).is_absolute():
            _put(Path(cache_dir(), rest), content)
    return found["captures"], found["regions"]


def to_bytes(artefact: CompiledArtifact) -> bytes:
    """Raises ValueError for one that was compiled with Inductor's caches off, of which torch keeps nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "region")
        try:
            artefact.save(path=file, format="binary")
        except RuntimeError as error:
            raise ValueError(
                f"what was compiled cannot be saved ({error}); compile with Inductor's caches on (force_disable_caches=False)."
            ) from error
        return Path(file).read_bytes()


def load_artefact(content: bytes) -> CompiledArtifact:
    """An artefact of ``load_artefacts``, executable."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "region")
        Path(file).write_bytes(content)
        return CompiledArtifact.load(path=file, format="binary")


def _surroundings() -> dict[str, Any]:
    """What compiled code depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "GPU": device,
        "system": platform.system(),
    }


def _vector_instructions(known: Any = None) -> dict[str, Any]:
    """What Inductor uses of the processor. known: what worked on one like it, where Inductor need not find out by compiling."""
    if known is not None:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        with config.patch({"cpp.vec_isa_ok": True}):
            if str(cpu_vec_isa.pick_vec_isa()) == known:
                return {"vector instructions": known}
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
    return {"vector instructions": str(cpu_vec_isa.pick_vec_isa())}


def _loaded_kernels() -> list[Path]:
    """Shared libraries in Inductor's cache folder that this process has loaded; known on Linux alone."""
    maps = Path("/proc/self/maps")
    folder = os.path.realpath(cache_dir()) + "/"
    lines = maps.read_text().splitlines() if maps.exists() else []
    names = {line.split(maxsplit=5)[5] for line in lines if line.count(" ") > 4 and line.endswith(".so") and folder in line}
    return sorted(Path(name) for name in names if name.startswith(folder) and os.path.exists(name))


def _put(path: Path, content: bytes) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(partial, 0o755)
    os.replace(partial, path)
