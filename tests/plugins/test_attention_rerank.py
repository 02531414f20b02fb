"""Attention as a re-ranker: masses as transformers' own eager attention gives them, heads found, layers left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.quickstart.models import minilm
from dagr_ray.stages.label import Label, RetrievalHeads
from dagr_ray.teachers import QueryPassage
from dagr_ray.teachers.attention_rerank import (
    ASK,
    BEFORE,
    CONTENT_FREE,
    AttentionRerank,
    AttentionSession,
    LabelledQuery,
    best_heads,
    head_scores,
)
from dagr_ray.teachers.hybrid import Hybrid
from tests.stages.test_select_mine import FixedTables, search

TEXTS = [
    "Return a shallow copy of the dictionary.",
    "Sort the list in place.",
    "x",
    "a " * 500,
    "[1] <|im_start|> 日本語",
]
PAIRS = [QueryPassage("q1", "copy a dict", f"d{i}", text) for i, text in enumerate(TEXTS)]


def test_the_prompt_is_as_committed():
    text = f"{BEFORE}\n\n[1] PASSAGE\n\n[2] PASSAGE{ASK} QUERY\n=== without a query: {CONTENT_FREE!r}\n"
    golden = Path(__file__).parents[1] / "golden" / f"attention-rerank-v{AttentionRerank.version}.txt"
    assert golden.read_text() == text, "the prompt changed: raise the version"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a small Llama with random weights: four layers of four heads on two keys, the vocabulary of MiniLM."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(model):
    return AttentionRerank(model=model, dtype="float32", max_words=12)


@pytest.fixture(scope="module")
def masses(teacher):
    return AttentionSession(teacher).masses(PAIRS)


def test_masses_equal_eager_attention(teacher, masses):
    """The definition, written out over one prompt: attention of the query's tokens less that of "N/A"'s."""
    session = AttentionSession(teacher)
    eager = AutoModel.from_pretrained(teacher.model, dtype=torch.float32, attn_implementation="eager").eval()
    order = sorted(PAIRS, key=lambda p: next(i for i, q in enumerate(_shown(session)) if q == session._cut(p.passage)))
    tokens, spans = session.tokenizer("").input_ids[:1] + session._ids(BEFORE), {}
    for number, pair in enumerate(order, 1):
        tokens = tokens + session._ids(f"\n\n[{number}] ")
        text = session._ids(session._cut(pair.passage))
        spans[pair.doc_id] = slice(len(tokens), len(tokens) + len(text))
        tokens = tokens + text

    def paid(query):
        ids = session._ids(query)
        with torch.inference_mode():
            found = eager(torch.tensor([tokens + session._ids(ASK) + ids]), output_attentions=True).attentions
        return torch.stack(found)[:, 0, :, -len(ids) :, : len(tokens)].mean(dim=2)

    difference = paid(" copy a dict") - paid(" N/A")
    for at, pair in enumerate(PAIRS):
        own = difference[..., spans[pair.doc_id]]
        if own.shape[-1] > 1:
            own = own * (own >= own.mean(-1, keepdim=True) - 2 * own.std(-1, keepdim=True))
        assert masses[..., at] == pytest.approx(own.sum(-1).numpy(), abs=2e-5)
    assert np.abs(masses).max() > 0.01


def _shown(session):
    """The passages in the order of the prompt."""
    seen = []
    original = session._ids

    def note(text):
        seen.append(text)
        return original(text)

    session._ids = note
    session.masses(PAIRS)
    del session._ids
    return [text for text in seen if any(text == session._cut(pair.passage) for pair in PAIRS)]


def test_the_order_of_the_pairs_says_nothing(teacher, masses):
    turned = AttentionSession(teacher).masses(PAIRS[::-1])
    assert turned[..., ::-1] == pytest.approx(masses, abs=1e-6)


def test_layers_above_the_last_head_are_not_loaded(teacher, masses):
    kept = teacher.model_copy(update={"heads": ((1, 3), (0, 2))})
    session = AttentionSession(kept)
    assert len(session.model.layers) == 2
    assert session.score(PAIRS) == pytest.approx((masses[1, 3] + masses[0, 2]).tolist(), abs=1e-5)
    cost = {}
    whole = teacher.open(Pool())
    assert whole.score(PAIRS, cost) == pytest.approx(masses.sum((0, 1)).tolist(), abs=1e-4)
    assert cost["prompt_tokens"] > 60 and whole.score([]) == []


def test_many_passages_are_asked_in_windows(teacher):
    many = [QueryPassage("q", "copy a dict", f"d{i}", f"number {i}") for i in range(9)] + [
        QueryPassage("q2", "sort", "d1", "one")
    ]
    scores = AttentionSession(teacher.model_copy(update={"window": 4})).score(many)
    assert len(scores) == 10 and np.isfinite(scores).all() and len(set(scores)) == 10


def test_heads_that_favour_the_relevant_passage_are_found():
    rng = np.random.default_rng(0)
    sample = []
    for q in range(6):
        pairs = [QueryPassage(f"q{q}", "", f"d{i}", "") for i in range(5)]
        masses = rng.uniform(0, 0.01, size=(3, 4, 5))
        masses[2, 1, 3] += 0.05  # attends to the relevant one
        masses[0, 0] += 0.9  # attends to all of them much
        sample.append((masses, LabelledQuery(pairs, frozenset({"d3"}))))
    scores = head_scores(sample, 0.01)
    assert scores.shape == (3, 4) and np.unravel_index(scores.argmax(), scores.shape) == (2, 1)
    assert scores[2, 1] > 0.9 and scores[0, 0] == pytest.approx(0.2, abs=0.1)
    flat = head_scores(sample, 1e6)
    assert flat == pytest.approx(np.full((3, 4), 0.2), abs=1e-6), "at a high temperature no head is better"
    both = head_scores([(sample[0][0], LabelledQuery(sample[0][1].pairs, frozenset({"d3", "d4"})))], 0.01)
    assert both[2, 1] < scores[2, 1], "another relevant passage counts in its turn, and is no negative"
    with pytest.raises(ConfigError, match="no query of the sample"):
        head_scores([], 0.01)


def heads_of(teacher, sample, keep):
    session = AttentionSession(teacher.model_copy(update={"heads": ()}))
    return best_heads(head_scores([(session.masses(each.pairs), each) for each in sample], 0.01), keep)


def test_heads_of_a_model(teacher, masses):
    sample = [LabelledQuery(PAIRS, frozenset({"d0"}))]
    heads = heads_of(teacher, sample, keep=3)
    scores = head_scores([(masses, sample[0])], 0.01)
    assert [scores[head] for head in heads] == pytest.approx(sorted(scores.ravel(), reverse=True)[:3], rel=1e-3)


def test_heads_found_by_one_stage_are_those_of_the_next(teacher, tmp_path):
    docs = FixedTables(rows={"corpus": tuple((pair.doc_id, "", pair.passage) for pair in PAIRS)})
    asked = (("q1", "copy a dict"), ("q2", "sort a list"), ("q3", "nobody judged this"))
    queries = FixedTables(rows={"queries": asked, "qrels.dev": (("q1", "d0", 1), ("q2", "d1", 1), ("q2", "d2", 0))})
    hits = search({q: [(pair.doc_id, 1.0 / i) for i, pair in enumerate(PAIRS, 1)] for q, _ in asked})
    found = RetrievalHeads(teacher=teacher, queries=queries, corpus=docs, searches=(hits,), keep=2)
    rows = materialize(found, str(tmp_path)).read("metrics").to_pylist()
    sample = [
        LabelledQuery([QueryPassage(q, text, pair.doc_id, pair.passage) for pair in PAIRS], frozenset({doc}))
        for (q, text), doc in zip(asked, ("d0", "d1"), strict=False)
    ]
    heads = heads_of(teacher, sample, keep=2)
    assert [row["measure"] for row in rows] == [f"core@{layer}.{head}" for layer, head in heads]
    assert rows[0]["value"] >= rows[1]["value"] > 0
    label = Label(teacher=teacher, queries=queries, corpus=docs, searches=(hits,), split="dev", heads=found)
    scores = [r["score"] for r in materialize(label, str(tmp_path)).read("scores").to_pylist() if r["query_id"] == "q1"]
    kept = AttentionSession(teacher.model_copy(update={"heads": heads}))
    assert scores == pytest.approx(kept.score(sample[0].pairs), abs=1e-5)
    with pytest.raises(ValueError, match="heads have no effect on the teacher 'hybrid'"):
        Label(teacher=Hybrid(), queries=queries, corpus=docs, searches=(hits,), heads=found)


def test_errors_name_the_cause(teacher, tmp_path):
    with pytest.raises(ConfigError, match=r"heads has \(9, 0\).*select heads of this model"):
        AttentionSession(teacher.model_copy(update={"heads": ((9, 0),)}))
    with pytest.raises(ConfigError, match="reads 1024; lower window or max_words"):
        many = [QueryPassage("q", "a", f"d{i}", "word " * 100) for i in range(40)]
        AttentionSession(teacher.model_copy(update={"max_words": 100})).score(many)
    with pytest.raises(ConfigError, match="40 hex digits"):
        AttentionRerank().check()
    with pytest.raises(ConfigError, match="is not supported; give a model of the Llama"):
        AttentionSession(AttentionRerank(model=str(minilm())))
