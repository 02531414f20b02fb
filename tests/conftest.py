"""What several test files share."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """What one Ray worker of one core has, whatever an engine in this process has set before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_beir(path: Path, docs: int = 60) -> Path:
    """A BEIR folder of ``docs`` short passages, a question for each; 12 of them are dev, the others test."""
    (path / "qrels").mkdir(parents=True)
    words = "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh".split()
    with open(path / "corpus.jsonl", "w") as corpus, open(path / "queries.jsonl", "w") as queries:
        for i in range(docs):
            a, b, c = words[i % 13], words[(i // 13 + i) % 13], words[(i * 7 + 3) % 13]
            text = f"The {a} near the {b} has number {i}. People visit the {c} every spring. It was first seen in {1700 + i}."
            corpus.write(json.dumps({"_id": f"d{i}", "title": f"{a} {b}", "text": text}) + "\n")
            queries.write(json.dumps({"_id": f"q{i}", "text": f"when was the {a} near the {b} number {i} seen"}) + "\n")
    for split, chosen in (("dev", range(0, 12)), ("test", range(12, docs))):
        rows = "".join(f"q{i}\td{i}\t1\n" for i in chosen)
        (path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return path
