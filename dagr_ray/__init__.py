"""DAGR-Ray: turn a pile of documents into a better retriever, and learn what it cost."""

import importlib
from typing import Any

from dagr_ray import moved

__version__ = "0.2.0"
# The names that a recipe begins with, and their modules; each is imported when it is first asked for.
_NAMES = {
    "BM25": "miners.bm25",
    "Beir": "stages.sources",
    "Dense": "miners.dense",
    "Encoder": "retrieval.encoder",
    "Exemplars": "stages.exemplars",
    "Placement": "core.placement",
    "Sample": "stages.sources",
    "Scorecard": "stages.evaluate",
    "Take": "stages.take",
    "Train": "stages.train",
    "augment": "recipes.augmentation",
    "generator_named": "recipes.augmentation",
    "judge": "recipes.evaluation",
    "materialize": "core.build",
}
__all__ = list(_NAMES)
moved.install()


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'dagr_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dagr_ray.{_NAMES[name]}"), name)
