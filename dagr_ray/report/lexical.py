"""Reports how BM25 analysed each data set of a study, and queries without results."""

from __future__ import annotations

from collections.abc import Iterable

from dagr_ray.core.artifact import Json
from dagr_ray.miners._analyzers import AUTO, ENGLISH, analyzer
from dagr_ray.report.lineage import Folders
from dagr_ray.stages.retrieve import NO_HITS


def lexical(folders: Folders, cards: Iterable[str], warnings: list[str]) -> list[Json]:
    """``data``, ``language`` and ``read_as`` of each data set that BM25 was evaluated on; ``cards`` are scorecard folders.

    Adds a warning if many queries have no results.
    """
    lines: dict[tuple[str, str], Json] = {}
    for card in cards:
        if folders.manifest(card) is None:
            continue
        for name in folders.ancestors(card):
            manifest = folders.manifest_or_empty(name)
            if folders.role(name) != "evaluate":
                continue
            data = str(manifest["stage"].get("name") or "data")
            for search in manifest["inputs"].values():
                search_manifest = folders.manifest_or_empty(search)
                miner = (search_manifest["stage"].get("index") or {}).get("miner") or {}
                if miner.get("type") != "bm25":
                    continue
                language = miner.get("language", ENGLISH)
                read_as = "its own language" if language == AUTO else analyzer(language).description
                line = {"data": data, "language": language, "read_as": read_as}
                if (data, read_as) not in lines and (
                    none := search_manifest["counts"]["no_hits"]
                ) > NO_HITS * search_manifest["counts"]["in"]:
                    warnings.append(
                        f"BM25 finds nothing for {none:,} of {search_manifest['counts']['in']:,} queries of {data}"
                    )
                lines[data, read_as] = line
    return list(lines.values())
