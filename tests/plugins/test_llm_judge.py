"""The real small model as a judge: probabilities as another library computes them, and grades that tell passages apart."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines._next_token import next_token
from dagr_ray.engines.vllm import VLLM
from dagr_ray.prompts import Prompt
from dagr_ray.quickstart import pydocs
from dagr_ray.quickstart.models import smollm2
from dagr_ray.stages.label import Label
from dagr_ray.teachers import NO_SCORE, QueryPassage
from dagr_ray.teachers.llm_judge import GRADES, LLMJudge, _JudgeSession
from tests.stages.test_select_mine import FixedTables

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


@pytest.fixture(scope="module")
def engine():
    # in bfloat16 the log-probabilities of grades are off by 0.2 on average, whichever kernels compute them
    return VLLM(model=str(smollm2()), dtype="float32", max_model_len=1024)


@pytest.fixture(scope="module")
def session(engine):
    opened = engine.open(Pool())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pairs():
    """Human queries for the standard library, each with its passage and with one drawn for another query."""
    passage_of = {p.doc_id: f"{p.title} {p.text}" for p in pydocs.stdlib_passages()}
    judged = pydocs.read_judgements("stdlib", set(passage_of))
    rows = [row for row in judged.qrels["dev"] if row["relevance"] > 0][::9][:16]
    found = []
    for i, row in enumerate(rows):
        other = rows[(i + 5) % len(rows)]["doc_id"]
        query = judged.queries[row["query_id"]]
        found += [QueryPassage(row["query_id"], query, d, passage_of[d]) for d in (row["doc_id"], other)]
    return found


def test_probabilities_equal_the_models(session, engine):
    prompt = Prompt("Passage:", " Return a shallow copy.", "\nQuery: copy a dict\nGrade:")
    [found] = next_token(session, [prompt], GRADES)
    tokenizer = AutoTokenizer.from_pretrained(engine.model)
    model = AutoModelForCausalLM.from_pretrained(engine.model, dtype=torch.float32).eval()
    expected = []
    for grade in GRADES:
        tokens = tokenizer(prompt.text + grade, return_tensors="pt").input_ids
        with torch.inference_mode():
            odds = model(tokens[:, :-1]).logits[0, -1].log_softmax(-1)
        expected.append(float(odds[tokens[0, -1]]))
    assert found.logprobs == pytest.approx(expected, abs=0.001)
    assert found.prompt_tokens == tokens.shape[1] - 1 and found.error is None
    turned = next_token(session, [prompt], GRADES[::-1])[0].logprobs
    assert turned[::-1] == pytest.approx(found.logprobs, abs=0.02)


def test_what_cannot_be_asked_does_not_take_the_others_with_it(session):
    asked = [Prompt("word " * 2000, "a", " b:"), Prompt("One, two,", " three", ","), Prompt("a", " b" * 3000, " c:")]
    long, good, cut = next_token(session, asked, GRADES)
    assert "max_model_len" in long.error and not long.logprobs
    assert good.error is None and len(good.logprobs) == 4 and not good.truncated
    assert cut.truncated and cut.prompt_tokens == 1023
    with pytest.raises(ConfigError, match="each choice must be one token"):
        next_token(session, asked[1:2], (" antidisestablishmentarianism", " 1"))


def test_a_relevant_passage_is_graded_higher(session, pairs):
    judge, cost = _JudgeSession(LLMJudge(engine=session.config, max_words=60), session), {}
    scores = judge.score(pairs, cost)
    assert all(0 <= score <= 3 for score in scores)
    own, other = scores[::2], scores[1::2]
    auc = sum((a > b) + (a == b) / 2 for a in own for b in other) / len(own) / len(other)
    calibrated = _JudgeSession(LLMJudge(engine=session.config, max_words=60, calibrate=True), session).score(pairs)
    taken = [a - b for a, b in zip(scores, calibrated, strict=True)]
    nothing = judge.score([pair._replace(query="N/A") for pair in pairs])
    assert taken == pytest.approx(nothing, abs=0.05)
    sharper = sum((a > b) + (a == b) / 2 for a in calibrated[::2] for b in calibrated[1::2]) / len(own) / len(other)
    print(f"AUC of the expected grade: {auc:.3f}, calibrated {sharper:.3f}")
    assert sharper > 0.6
    assert sum(own) / len(own) > sum(other) / len(other) and auc > 0.6
    assert cost["completion_tokens"] == len(pairs) and cost["prompt_tokens"] > 200 * len(pairs)
    assert cost["cached_tokens"] > 100 * (len(pairs) - 1), "instructions and examples are computed once"


def test_duels_are_fair(session, pairs):
    judge, cost = _JudgeSession(LLMJudge(engine=session.config, form="pairwise", max_words=40), session), {}
    own = pairs[:8]
    scores = judge.score(own, cost)
    assert cost["completion_tokens"] == len(own), "two passages of a query meet once, in both orders"
    assert [a + b for a, b in zip(scores[::2], scores[1::2], strict=True)] == pytest.approx([1.0] * 4)
    same = [QueryPassage("q", "copy a dict", d, "Return a shallow copy.") for d in "ab"]
    assert judge.score(same) == pytest.approx([0.5, 0.5], abs=1e-6), "equal passages are equal, whoever stands first"
    assert judge.score(own[:1]) == [0.5], "a passage alone meets nobody"


def test_a_pair_that_cannot_be_asked_has_no_score(session):
    judge = _JudgeSession(LLMJudge(engine=session.config, task="word " * 2000), session)
    [score] = judge.score([QueryPassage("q", "a", "d", "b")])
    assert math.isnan(score) and math.isnan(NO_SCORE)


def test_as_a_stage_with_its_cost(session, engine, pairs, tmp_path):
    """The last test with the session: the stage opens an engine of its own, which ends the other."""
    some = pairs[:4]
    docs = {pair.doc_id: pair.passage for pair in some}
    data = FixedTables(
        rows={
            "corpus": tuple((doc_id, "", text) for doc_id, text in docs.items()),
            "queries": tuple({pair.query_id: pair.query for pair in some}.items()),
            "qrels": tuple((pair.query_id, pair.doc_id, 1) for pair in some),
        }
    )
    teacher = LLMJudge(engine=engine, max_words=60)
    expected = _JudgeSession(teacher, session).score(some)
    stage = Label(teacher=teacher, queries=data, corpus=data)
    folder = materialize(stage, str(tmp_path), Placement(generate=Pool(shard_rows=1)))
    rows = {(r["query_id"], r["doc_id"]): r["score"] for r in folder.read("scores").to_pylist()}
    assert [rows[p.query_id, p.doc_id] for p in some] == pytest.approx(expected, abs=0.15)
    bill = folder.manifest["bill"]
    assert bill["tokens"]["prompt"] == folder.manifest["cost"]["prompt_tokens"] > 800
    assert folder.manifest["counts"]["in"] == 4 and len(folder.receipts()) == 2


def test_bfloat16_is_near_float32(pairs, engine):
    asked = [Prompt("Passage: ", " ".join(p.passage.split()[:60]), f"\nQuery: {p.query}\nGrade:") for p in pairs]
    found = []
    for dtype in ("float32", "bfloat16"):
        opened = engine.model_copy(update={"dtype": dtype}).open(Pool())
        found.append(torch.tensor([answer.logprobs for answer in next_token(opened, asked, GRADES)]))
        opened.close()
    error = (found[0] - found[1]).abs()
    assert error.shape == (len(pairs), len(GRADES))
    # 0.2 on average, with vLLM's own norms as with its kernels for them
    assert 0 < error.mean() < 0.3, error
