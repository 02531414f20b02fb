"""What several test files share."""

import json
import os
import signal
from pathlib import Path

import pytest


def pytest_configure():
    """Not at import: others take ``tiny_beir`` from here."""
    # Ray workers and the JVM in one process: both handle SIGSEGV.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # Test files run side by side: threads that wait for a core which another file keeps busy make a step ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell's background job, and xdist, ignore Ctrl-C, by which a row that hangs in this process is ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files of more than half a minute begin first, so that none of them is alone at the end.
SLOW = (
    "study train_resume chaos object_store vllm_start openai_vllm train_steps train index_parts bill odd_rows resume canary "
    "poison nodes llm_judge vllm vllm_arguments vllm_feeding tracking"
).split()


def pytest_collection_modifyitems(items):
    """The order in which pytest's workers take up files (with --no-loadscope-reorder)."""
    place = {f"test_{name}.py": i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


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
