"""What a recipe asks and what comes of it, for a few rows: ``dagr preview``."""

from __future__ import annotations

from collections.abc import Iterator

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import Stage, walk
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.pairs import AsQueries, Linked, Pairs
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.rewrite import Rewrite
from dagr_ray.stages.sources import Sample


def generation_of(recipe: Stage) -> Generate | None:
    """The last generation of a recipe, which it is about: those before it wrote what this one asks about."""
    return next((stage for stage in reversed(walk(recipe)) if isinstance(stage, Generate)), None)


def shown(generate: Generate, rows: int, runs: str, placement: Placement) -> Iterator[str]:
    """Lines with the exact prompts of ``rows`` rows, each completion, and what is read out of it or why it is rejected.

    A strategy that reads pairs is shown with people's own queries: the recipe's would have to be generated first.
    """
    few = generate.model_copy(update={"corpus": _few(generate.corpus, rows, runs)})
    plain = (few.strategy.reads, few.strategy.writes) == ("corpus", "queries")
    folder = materialize(
        Parse(generations=few, corpus=few.corpus) if plain else Rewrite(generations=few), runs, placement
    )
    raw = few.folder(runs).read("generations").to_pylist()
    texts = {row["query_id"]: row["text"] for row in folder.read("queries").to_pylist()}
    if "corpus" in folder.table_names():
        texts |= {row["doc_id"]: row["text"] for row in folder.read("corpus").to_pylist()}
    kept: dict[str, list[str]] = {}
    for row in folder.read("lineage").to_pylist():
        kept.setdefault(row["gen_id"], []).append(texts[row["id"]])
    refused = {row["id"]: row["reason"] for row in folder.read("rejected").to_pylist()}
    inputs = {name: stage.folder(runs) for name, stage in few.inputs().items()}
    ids = [row["source_id"] for row in raw]
    prompts = {number: few.prompts(inputs, ids, number) for number in {row["sample"] for row in raw}}
    last = ""
    for row in raw:
        prompt = prompts[row["sample"]][row["source_id"]]
        if prompt != last:  # samples share one, unless the strategy words each anew
            last = prompt
            yield f"=== {row['source_id']}\n{prompt}"
        yield f"--- sample {row['sample']} ({row['finish_reason']}): {row['raw']!r}"
        yield f"    -> {kept.get(row['gen_id']) or 'rejected: ' + refused.get(row['gen_id'], '?')}"


def _few(asked: Stage, rows: int, runs: str) -> Stage:
    """``rows`` of what a generation asks about."""
    if "pairs" not in asked.outputs:
        return Sample(corpus=asked, n=rows)
    if isinstance(asked, Linked):
        passages = Sample(corpus=asked.passages, n=rows)
        search = asked.search.model_copy(update={"queries": AsQueries(corpus=passages)})
        return asked.model_copy(update={"passages": passages, "search": search})
    for data in walk(asked):
        if not data.inputs() and {"corpus", "queries"} <= set(data.outputs):
            judged = materialize(data, runs).table_names()
            split = next((s for s in ("dev", "train", "test") if f"qrels.{s}" in judged), None)
            if split is not None:
                return Pairs(queries=data, corpus=data, split=split, n=rows)
    raise ConfigError(
        f"{asked.folder_name()} is made of queries, and no data set with judged ones is there to show it with"
    )
