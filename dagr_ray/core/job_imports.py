"""Modules beside a job's file: importable in the driver and in every worker."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

# Folders of the jobs that were loaded, the last one first: what lies there is importable. Those that were not before:
_beside: list[str] = []
_added: set[str] = set()


def beside() -> list[str]:
    """The folders of the jobs that this process has loaded."""
    return list(_beside)


def import_beside(folders: Sequence[str]) -> None:
    """Makes what lies in the folders importable, after all that is installed, so that nothing of that is covered."""
    for folder in reversed(folders):
        if folder in _added:
            sys.path.remove(folder)
            _added.remove(folder)
        if folder not in sys.path:
            sys.path.insert(len(sys.path) - len(_added), folder)
            _added.add(folder)
        _beside[:] = [folder, *(each for each in _beside if each != folder)]


@contextlib.contextmanager
def importing_beside(folder: str) -> Iterator[None]:
    """A job of the folder is loaded inside. What it and earlier jobs have imported from beside them is read anew."""
    for name, module in list(sys.modules.items()):
        if _home(module) in _added:
            del sys.modules[name]
    importlib.invalidate_caches()
    import_beside([folder])
    yield


def _home(module: ModuleType) -> str | None:
    """The folder that a module, or the package around it, lies in."""
    file, name = getattr(module, "__file__", None), getattr(module, "__name__", "")
    if not file or name.startswith("dagr_ray"):
        return None
    above = Path(file).parents
    up = name.count(".") + (Path(file).name == "__init__.py")
    return str(above[up]) if up < len(above) else None


def send_whole() -> None:
    """Classes and functions from beside a job are sent to workers whole: these may have no such folder."""
    from ray import cloudpickle

    for name, module in list(sys.modules.items()):
        if "." not in name and _beside and _home(module) in _beside:
            cloudpickle.register_pickle_by_value(module)
