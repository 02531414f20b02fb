"""The translated queries of the leak benchmark: words alone do not find them, their meaning does."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from dagr_ray.core import tables
from dagr_ray.leakage.matching import FLOORS, MECHANISMS, HeldOut
from dagr_ray.quickstart import pydocs
from dagr_ray.stages.leakage import LeakGate

TRANSLATED = Path(__file__).with_name("leak_translated.jsonl")
LEAST = {name: LeakGate.model_fields[name].default for name in FLOORS}


def texts(*given):
    return pa.array(given, tables.TEXT)


class _Every(set):
    """Passage ids of which none is missing: only queries are wanted here."""

    def __contains__(self, item):
        return True


def test_a_translation_is_found_by_its_meaning_alone():
    rng = np.random.default_rng(3)
    rows = [json.loads(line) for line in TRANSLATED.read_text().splitlines()]
    german = {row["query_id"]: row["text"] for row in rows if row["language"] == "de"}
    english = {q: t for q, t in pydocs.read_judgements("stdlib", _Every()).queries.items() if q in german}
    meant = rng.normal(size=(len(english), 384)).astype(np.float32)
    meant /= np.linalg.norm(meant, axis=1, keepdims=True)
    said = meant + rng.normal(size=meant.shape).astype(np.float32) * 0.003  # as an encoder of both languages has it
    said /= np.linalg.norm(said, axis=1, keepdims=True)
    held = HeldOut(texts(*english.values()), vectors=meant)
    asked = texts(*(german[q] for q in english))
    assert len(english) > 20 and len(held.find_similar(asked).over(LEAST)) == 0
    found = held.find_similar(asked, said).over(LEAST)
    pairs = sorted(zip(found.rows.tolist(), found.held_out.tolist(), strict=True))
    assert pairs == [(i, i) for i in range(len(english))]
    assert {MECHANISMS[how] for how in found.how} == {"embedding"}
