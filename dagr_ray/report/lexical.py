"""How BM25 read each data set of a study, and what it did not find."""

from __future__ import annotations

from collections.abc import Iterable

from dagr_ray.core.artifact import Json
from dagr_ray.miners._analyzers import AUTO, ENGLISH, analyzer
from dagr_ray.report.lineage import Folders
from dagr_ray.stages.retrieve import NO_HITS


def lexical(folders: Folders, cards: Iterable[str], warnings: list[str]) -> list[Json]:
    """``data``, ``language`` and ``read_as`` of each set that BM25 was judged on; ``cards`` are its scorecards' folders.

    Adds to ``warnings`` where many queries found nothing.
    """
    found: dict[tuple[str, str], Json] = {}
    for card in cards:
        if folders.manifest(card) is None:
            continue
        for name in folders.ancestors(card):
            manifest = folders.found(name)
            if manifest["stage"].get("type") != "evaluate":
                continue
            data = str(manifest["stage"].get("name") or "data")
            for search in manifest["inputs"].values():
                made = folders.found(search)
                miner = (made["stage"].get("index") or {}).get("miner") or {}
                if miner.get("type") != "bm25":
                    continue
                language = miner.get("language", ENGLISH)
                read_as = "its own language" if language == AUTO else analyzer(language).described
                line = {"data": data, "language": language, "read_as": read_as}
                if (data, read_as) not in found and (none := made["counts"]["no_hits"]) > NO_HITS * made["counts"][
                    "in"
                ]:
                    warnings.append(f"BM25 finds nothing for {none:,} of {made['counts']['in']:,} queries of {data}")
                found[data, read_as] = line
    return list(found.values())
