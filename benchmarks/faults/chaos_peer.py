"""The generation, fan-out and filter of benchmarks/faults/chaos.py as a Ray Data pipeline with Ray Data's own checkpoints.

    python -m benchmarks.faults.chaos_peer SET HOME LOG NUMBER

Every passage becomes two rows, of which those that a filter refuses are dropped; what is written is Parquet. The id of
an output row is that of its passage and sample, the checkpoint's id column that of its passage, as its API wants it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.faults.slow_engine import SlowCrop
from dagr_ray.core.placement import Pool
from dagr_ray.core.tables import seed_of
from dagr_ray.engines import Sampling
from dagr_ray.engines.crop import CropEngine
from dagr_ray.prompts import Passage
from dagr_ray.strategies.crop import Crop

WORKERS, SHARD_ROWS, SAMPLES, PAUSE_S = 2, 20, 2, 0.02


def rows_of(data: Path) -> list[dict[str, str]]:
    """The passages of a BEIR folder."""
    return [{"doc_id": row["_id"], "text": row["text"]} for row in map(json.loads, (data / "corpus.jsonl").open())]


def asked(doc_id: str, text: str, number: int) -> tuple[Any, int]:
    """A passage's prompt and seed in pass ``number``."""
    seed = seed_of(number, doc_id)
    return Crop().prompt(Passage(doc_id, "", text), (), random.Random(seed)), seed


def kept(text: str) -> bool:
    """The filter: the length of ``Length(min_words=9)``."""
    return len(text.split()) >= 9


class Generate:
    """Fans a batch of passages out into the rows that pass the filter."""

    def __init__(self, log: str, number: int) -> None:
        self.session = SlowCrop(pause_s=PAUSE_S, log=log).open(Pool())
        self.number = number

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pairs = [asked(doc_id, text, self.number) for doc_id, text in zip(batch["doc_id"], batch["text"], strict=True)]
        answers = self.session.generate([p for p, _ in pairs], [s for _, s in pairs], Sampling(), SAMPLES)
        made: dict[str, list[str]] = {"doc_id": [], "id": [], "query": []}
        for doc_id, answer in zip(batch["doc_id"], answers, strict=True):
            for i, completion in enumerate(answer):
                if kept(completion.raw or ""):
                    made["doc_id"].append(doc_id)
                    made["id"].append(f"{doc_id}/{i}")
                    made["query"].append(completion.raw or "")
        return made


def calm(data: Path, number: int) -> tuple[dict[str, str], int]:
    """Id -> query of an undisturbed pass, and the words that it asks about."""
    found: dict[str, str] = {}
    words = 0
    session = CropEngine().open(Pool())
    for row in rows_of(data):
        prompt, seed = asked(row["doc_id"], row["text"], number)
        words += len(prompt.passage.split())
        [answer] = session.generate([prompt], [seed], Sampling(), SAMPLES)
        texts = ((i, completion.raw or "") for i, completion in enumerate(answer))
        found |= {f"{row['doc_id']}/{i}": text for i, text in texts if kept(text)}
    return found, words


def made(home: Path, number: int) -> list[tuple[str, str]]:
    """The ids and queries that a pass has written; a file that cannot be read has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: list[tuple[str, str]] = []
    for file in (home / f"out-{number}").glob("*.parquet"):
        try:
            rows = pq.read_table(file, columns=["id", "query"])
            found += zip(rows["id"].to_pylist(), rows["query"].to_pylist(), strict=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            continue
    return found


def main() -> int:
    """One run: begins, or goes on from the checkpoints."""
    data, home, log, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from ray.data.checkpoint import CheckpointConfig

    source = home / "in.parquet"
    if not source.exists():
        pq.write_table(pa.Table.from_pylist(rows_of(data)), f"{source}.tmp", row_group_size=SHARD_ROWS)
        Path(f"{source}.tmp").rename(source)
    ray.init(address="auto", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="doc_id", checkpoint_path=str(home / f"checkpoint-{number}"), delete_checkpoint_on_success=False
    )
    rows = ray.data.read_parquet(str(source), override_num_blocks=max(len(rows_of(data)) // SHARD_ROWS, 1))
    rows.map_batches(
        Generate,
        fn_constructor_args=(log, number),
        batch_size=SHARD_ROWS,
        compute=ray.data.ActorPoolStrategy(size=WORKERS, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
    ).write_parquet(str(home / f"out-{number}"), mode=ray.data.SaveMode.APPEND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
