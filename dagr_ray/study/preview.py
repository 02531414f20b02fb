"""Shows the prompts and answers of a recipe for a few rows: ``dagr preview``."""

from __future__ import annotations

from collections.abc import Iterator

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import Stage, walk
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.pairs import AsQueries, LinkedPairs, Pairs
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.rewrite import Rewrite
from dagr_ray.stages.sources import Sample


def generation_of(recipe: Stage) -> Generate | None:
    """The last generation of a recipe. Earlier generations write the texts that the last one asks about."""
    return next((stage for stage in reversed(walk(recipe)) if isinstance(stage, Generate)), None)


def preview_lines(generate: Generate, rows: int, runs: str, placement: Placement) -> Iterator[str]:
    """Lines with the exact prompts of ``rows`` rows, each completion, and its parsed texts or the reason of its rejection.

    A strategy that reads pairs is shown with human queries: the recipe's own queries would have to be generated first.
    """
    few = generate.model_copy(update={"corpus": _first_rows(generate.corpus, rows, runs)})
    writes_queries = (few.strategy.reads, few.strategy.writes) == ("corpus", "queries")
    folder = materialize(
        Parse(generations=few, corpus=few.corpus) if writes_queries else Rewrite(generations=few), runs, placement
    )
    raw = few.folder(runs).read("generations").to_pylist()
    texts = {row["query_id"]: row["text"] for row in folder.read("queries").to_pylist()}
    if "corpus" in folder.table_names():
        texts |= {row["doc_id"]: row["text"] for row in folder.read("corpus").to_pylist()}
    parsed: dict[str, list[str]] = {}
    for row in folder.read("lineage").to_pylist():
        parsed.setdefault(row["gen_id"], []).append(texts[row["id"]])
    reasons = {row["id"]: row["reason"] for row in folder.read("rejected").to_pylist()}
    inputs = {name: stage.folder(runs) for name, stage in few.inputs().items()}
    ids = [row["source_id"] for row in raw]
    prompts = {number: few.prompts(inputs, ids, number) for number in {row["sample"] for row in raw}}
    last = ""
    for row in raw:
        prompt = prompts[row["sample"]][row["source_id"]]
        if prompt != last:  # all samples share a prompt, unless the strategy words each one differently
            last = prompt
            yield f"=== {row['source_id']}\n{prompt}"
        yield f"--- sample {row['sample']} ({row['finish_reason']}): {row['raw']!r}"
        yield f"    -> {parsed.get(row['gen_id']) or 'rejected: ' + reasons.get(row['gen_id'], '?')}"


def _first_rows(source: Stage, rows: int, runs: str) -> Stage:
    """A stage with ``rows`` rows of the passages or pairs that a generation reads."""
    if "pairs" not in source.outputs:
        return Sample(corpus=source, n=rows)
    if isinstance(source, LinkedPairs):
        passages = Sample(corpus=source.passages, n=rows)
        search = source.search.model_copy(update={"queries": AsQueries(corpus=passages)})
        return source.model_copy(update={"passages": passages, "search": search})
    for data in walk(source):
        if not data.inputs() and {"corpus", "queries"} <= set(data.outputs):
            names = materialize(data, runs).table_names()
            split = next((s for s in ("dev", "train", "test") if f"qrels.{s}" in names), None)
            if split is not None:
                return Pairs(queries=data, corpus=data, split=split, n=rows)
    raise ConfigError(
        f"{source.folder_name()} reads queries; a preview needs a data set with judged queries, and the recipe has none"
    )
