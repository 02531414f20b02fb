"""Names of 0.1 that have changed, so that jobs and plugins written for it still work. Removed in 0.3.

An old module is an empty one that looks up each attribute in the modules that replaced it. An old class or function is
looked up under its new name, and a method that a plugin overrides under its old name is called under the new one. The
first use of an old module or method logs one line.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

log = logging.getLogger("dagr")
# Module of 0.1 -> where its names are now.
MOVED = {
    "agreement": "annotation.agreement",
    "artifact": "core.artifact",
    "beir": "formats.beir",
    "beside": "core.joins",
    "bill": "core.cost",
    "catalogue": "recipes",
    "cluster": "core.placement core.ray_pool core.ray_start core.job_imports",
    "config": "core.config",
    "doctor": "packages cli.doctor",
    "engines.feeding": "engines._feeding",
    "exact": "retrieval.exact_search",
    "export": "formats.export",
    "filters.controls": "strategies._control_checks",
    "filters.held_out": "leakage.matching",
    "filters.sketch": "leakage.minhash",
    "fusion": "retrieval.fusion",
    "goal": "stages.generate_until",
    "index": "retrieval.vectors",
    "items": "annotation.sampling",
    "job": "study.job",
    "language": "core.language",
    "markers": "core.special_tokens",
    "models": "quickstart.models",
    "parquet": "formats.parquet",
    "paths": "core.paths",
    "progress": "cli.progress",
    "pydocs": "quickstart.pydocs",
    "retriever": "retrieval.encoder",
    "stage": "core.stage core.build core.attempt",
    "stages.blend": "stages.mix",
    "stages.corpus": "stages.sources",
    "stages.dev": "stages.dev_split",
    "stages.leak": "stages.leakage",
    "stages.mask": "stages.mask_pii",
    "stages.people": "stages.human_labels",
    "stages.runs": "stages.trec",
    "store": "core.storage",
    "strategies.controls": "strategies._controls",
    "strategies.rewriting": "strategies._rewriting",
    "strategies.written": "strategies._one_query",
    "tables": "core.tables",
    "terminal": "core.terminal",
    "tracking": "study.mlflow_mirror",
    "training.losses": "losses losses.info_nce losses.margin_mse losses.kl",
    "trec": "formats.trec",
    "weights": "retrieval.weights",
    "whole": "stages.score",
    "words": "core.words",
}
# Module that still exists -> the modules where some of its names are now.
PARTLY_MOVED = {
    "engines": "core.stage",
    "stages.generate": "stages.exemplars stages.parse",
    "stages.mine": "stages.relabel",
    "stages.mix": "stages.describe",
    "stages.select": "stages.score stages.take",
    "strategies": "prompts",
}
# Module of today -> its names of 0.1 with those that took their place.
RENAMED = {
    "annotation.import_": {"take": "import_ratings"},
    "annotation.sampling": {"Pair": "PairId", "Pairs": "PairPool"},
    "core.artifact": {"Attempt": "AttemptLog"},
    "core.build": {"survey": "plan"},
    "core.config": {
        "Later": "OmitWhenDefault",
        "fingerprints_held": "fingerprint_cache",
        "content_held": "cached_content",
    },
    "core.cost": {
        "holds": "resources_held",
        "Attempt": "AttemptCost",
        "attempt_of": "find_attempt",
        "lost": "unfinished_ranges",
        "within_budget": "with_remaining_budget",
    },
    "core.job_imports": {
        "beside": "job_folders",
        "import_beside": "add_job_folders",
        "importing_beside": "loading_job",
        "send_whole": "pickle_job_modules_by_value",
    },
    "core.joins": {"Candidates": "SearchResults"},
    "core.language": {"written": "base_language", "SPOKEN": "PASSAGE_CHARACTERS"},
    "core.paths": {"told_apart": "distinct_names", "several": "split_values", "model_named": "model_path"},
    "core.ray_pool": {"where": "node_id", "memory_is_short": "is_memory_short"},
    "core.special_tokens": {"unmarked": "escape_special_tokens"},
    "core.storage": {"check_can_be_written": "check_writable", "one_name": "plain_name"},
    "core.tables": {
        "asked_about": "prompt_source",
        "folded": "fold_texts",
        "judgements": "qrels_table",
        "mint": "id_of",
        "minted": "hash_id",
        "part": "encode_id_part",
        "seeded": "seed_for",
        "spaced": "escape_spaces",
        "unspaced": "unescape_spaces",
        "widened": "fill_columns",
    },
    "core.terminal": {"Shown": "EscapingFormatter"},
    "engines": {"paid": "token_usage"},
    "filters": {"Candidate": "ScoredQuery"},
    "filters.pii": {"Found": "Span"},
    "formats.beir": {
        "Problem": "LineProblem",
        "judgement_file": "read_qrels_file",
        "judgements": "read_qrels",
        "told": "summarise_problems",
    },
    "formats.export": {"judged_beside": "qrels_path", "whole_corpus": "full_corpus"},
    "formats.parquet": {"Checked": "RowCheck"},
    "leakage.joins": {"Alike": "SimilarSets"},
    "leakage.matching": {"Answered": "SharedAnswers", "Telling": "WordInformation"},
    "leakage.minhash": {
        "hashed": "hash_texts",
        "mixed": "mix_bits",
        "picked": "take_lists",
        "repeated": "find_repeated",
    },
    "losses": {"Scored": "LossBatch"},
    "prompts": {"Dice": "LazyRandom"},
    "quickstart.pydocs": {"Judged": "JudgedQueries", "Passage": "DocEntry", "judgements": "read_judgements"},
    "retrieval.vectors": {"Hits": "Ranking"},
    "stages.generate_until": {"Reach": "GenerateUntil"},
    "stages.human_labels": {"Labelled": "WithHumanLabels"},
    "stages.label": {"Heads": "RetrievalHeads"},
    "stages.mix": {"Blend": "MixExamples", "Human": "HumanPairs", "Mix": "MixQueries"},
    "stages.pairs": {"Linked": "LinkedPairs"},
    "stages.refine": {"Best": "TopExemplars", "Criticised": "CritiquedPairs", "Left": "RemainingPassages"},
    "stages.retrieve": {"Asking": "SearchBase", "Probe": "RecallProbe", "Slabs": "ShardedSearch"},
    "stages.rewrite": {"Together": "ConcatCorpora"},
    "stages.score": {"Whole": "StreamScores"},
    "strategies._control_checks": {"controlled": "controls_of", "missed": "first_violation"},
    "strategies._one_query": {"Written": "OneQuery"},
    "strategies._rewriting": {"Form": "FewShot"},
    "study.canary": {"fly": "run_canaries"},
    "teachers": {"Hit": "SearchHit", "Pair": "QueryPassage", "Spread": "ScoreSpread"},
    "teachers.attention_rerank": {"Judged": "LabelledQuery"},
    "training.batches": {"Row": "ExampleRow", "cut": "split_rows"},
    "training.loop": {"Fitted": "TrainingResult"},
    "training.step": {"gathered": "gather"},
}
# Types of 0.1's stages, as their folders' plans hold them -> the types now.
TYPES = {
    "best": "top-exemplars",
    "blend": "mix-examples",
    "criticised": "critiqued-pairs",
    "heads": "retrieval-heads",
    "human": "human-pairs",
    "labelled": "with-human-labels",
    "left": "remaining-passages",
    "linked": "linked-pairs",
    "mix": "mix-queries",
    "probe": "recall-probe",
    "reach": "generate-until",
    "slabs": "sharded-search",
    "together": "concat-corpora",
    "whole": "stream-scores",
}


def _look_up(module: ModuleType, homes: str) -> None:
    def find(name: str) -> Any:
        own = RENAMED.get(module.__name__.removeprefix("dagr_ray."), {})
        if name in own:
            return getattr(module, own[name])
        if not name.startswith("__"):
            for home in homes.split():
                there = importlib.import_module(f"dagr_ray.{home}")
                now = RENAMED.get(home, {}).get(name, name)
                if hasattr(there, now):
                    return getattr(there, now)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = find  # type: ignore[method-assign]


class _Old(Loader):
    """Loads a module that has moved as one without content."""

    def __init__(self, homes: str) -> None:
        self.homes = homes

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        now = ", ".join(f"dagr_ray.{home}" for home in self.homes.split())
        log.warning("%s has moved to %s; its old name goes with 0.3", module.__name__, now)
        _look_up(module, self.homes)


class _Partly(Loader):
    """Loads a module as it is, and then looks up elsewhere what it has no more."""

    def __init__(self, loader: Loader, homes: str) -> None:
        self.loader, self.homes = loader, homes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _look_up(module, self.homes)

    def __getattr__(self, name: str) -> Any:  # what tools ask a loader for: its source, its resources
        return getattr(self.loader, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "dagr_ray":
            return None
        if name in MOVED:
            return ModuleSpec(fullname, _Old(MOVED[name]))
        spec = PathFinder.find_spec(fullname, path) if name in PARTLY_MOVED or name in RENAMED else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Partly(spec.loader, PARTLY_MOVED.get(name, ""))
        return spec


def rename_methods(cls: type, names: Mapping[str, str]) -> None:
    """Makes a plugin's methods with old names override those with new names. ``names`` is old -> new."""
    for old, new in names.items():
        if old in cls.__dict__ and new not in cls.__dict__:
            log.warning("%s.%s is now called %s; its old name goes with 0.3", cls.__name__, old, new)
            setattr(cls, new, cls.__dict__[old])


def install() -> None:
    """Makes the old names importable; a second call does nothing."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
