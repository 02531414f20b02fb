"""Functions that return stages, shared by jobs."""

from dagr_ray.recipes.augmentation import augment, filtered, gated, generator_named, own_round_trip
from dagr_ray.recipes.evaluation import judge, named_sets, shown_split
from dagr_ray.recipes.filters import filtered_by
from dagr_ray.recipes.ladder import RUNGS, Rung, Source, climb, refreshed
from dagr_ray.recipes.negatives import NEGATIVES, hybrid_scores, negatives_from
from dagr_ray.recipes.refinement import refine
from dagr_ray.recipes.strategies import Arm, arm, mixed, parts, strategy_named

__all__ = [
    "NEGATIVES", "RUNGS", "Arm", "Rung", "Source", "arm", "augment", "climb", "filtered", "filtered_by", "gated",
    "generator_named", "hybrid_scores", "judge", "mixed", "named_sets", "negatives_from", "own_round_trip", "parts",
    "refine", "refreshed", "shown_split", "strategy_named",
]  # fmt: skip
