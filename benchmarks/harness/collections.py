"""Collections for benchmarks that need passages of no meaning."""

import json
from pathlib import Path


def numbered(folder: Path, passages: int) -> Path:
    """Writes a BEIR folder of short passages that differ by their numbers, a query for each, the first of them
    judged; returns the folder."""
    (folder / "qrels").mkdir(parents=True)
    words = "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh".split()
    with open(folder / "corpus.jsonl", "w") as corpus, open(folder / "queries.jsonl", "w") as queries:
        for i in range(passages):
            a, b, c = words[i % 13], words[(i // 13 + i) % 13], words[(i * 7 + 3) % 13]
            text = f"The {a} near the {b} has number {i}. People visit the {c} every spring. It was first seen in {1700 + i}."
            corpus.write(json.dumps({"_id": f"d{i}", "title": f"{a} {b}", "text": text}) + "\n")
            queries.write(json.dumps({"_id": f"q{i}", "text": f"when was the {a} number {i} seen"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    return folder
