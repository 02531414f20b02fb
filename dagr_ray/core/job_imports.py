"""Makes modules in a job's folder importable, in the driver and in every worker."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

# Folders of the loaded jobs, the last one first; and the subset that this module added to sys.path.
_job_folders: list[str] = []
_added: set[str] = set()


def job_folders() -> list[str]:
    """The folders of the jobs that this process has loaded."""
    return list(_job_folders)


def add_job_folders(folders: Sequence[str]) -> None:
    """Makes modules in the folders importable, at the end of sys.path, so that they hide no installed package."""
    for folder in reversed(folders):
        if folder in _added:
            sys.path.remove(folder)
            _added.remove(folder)
        if folder not in sys.path:
            sys.path.insert(len(sys.path) - len(_added), folder)
            _added.add(folder)
        _job_folders[:] = [folder, *(other for other in _job_folders if other != folder)]


@contextlib.contextmanager
def loading_job(folder: str) -> Iterator[None]:
    """Context in which a job of the folder is loaded. Modules that earlier loads imported from job folders are re-read."""
    for name, module in list(sys.modules.items()):
        if _import_root(module) in _added:
            del sys.modules[name]
    importlib.invalidate_caches()
    add_job_folders([folder])
    yield


def _import_root(module: ModuleType) -> str | None:
    """The folder from which a module, or the package around it, is imported."""
    file, name = getattr(module, "__file__", None), getattr(module, "__name__", "")
    if not file or name.startswith("dagr_ray"):
        return None
    parents = Path(file).parents
    depth = name.count(".") + (Path(file).name == "__init__.py")
    return str(parents[depth]) if depth < len(parents) else None


def pickle_job_modules_by_value() -> None:
    """Sends classes and functions of job folders to workers by value: a worker may not have the folder."""
    from ray import cloudpickle

    for name, module in list(sys.modules.items()):
        if "." not in name and _job_folders and _import_root(module) in _job_folders:
            cloudpickle.register_pickle_by_value(module)
