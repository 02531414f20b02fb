"""Rows that are exported for training are read by the trainer they are for."""

import json
import logging

import pytest
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.formats import export
from tests.support.toys import HERE, Toy, tiny

# negatives of the examples, in turn -> columns of each row
CASES = {(1,): 3, (3,): 5, (2, 5): 7, (0, 3, 1): 5, (0,): 2, (4, 1, 1, 1): 6}


@pytest.mark.parametrize("negatives", CASES, ids=str)
def test_rows_with_uneven_negatives_are_valid_for_the_trainer(tmp_path, negatives, caplog):
    toy, target = Toy(n=8, negatives=negatives), tmp_path / "rows.jsonl"
    made = materialize(toy, str(tmp_path / "runs"), HERE)
    with caplog.at_level(logging.INFO, "dagr"):
        assert export.to_sentence_transformers(made, str(tmp_path / "runs"), str(target)) == {str(target): 8}
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert {len(row) for row in rows} == {CASES[negatives]}
    told = [record.getMessage() for record in caplog.records if "negatives; they repeat" in record.getMessage()]
    assert len(told) == (len({*negatives}) > 1)
    text_of = {row["doc_id"]: row["text"] for row in toy.rows()["corpus"]}
    for row, example in zip(rows, made.read("examples").to_pylist(), strict=True):
        found = [text for name, text in row.items() if name.startswith("negative_")]
        own = [next(t for t in found if t.endswith(text_of[d])) for d in example["negative_ids"]]
        assert own == found[: len(own)] and (set(found) == set(own) if own else row["positive"] not in found)
        assert max(map(found.count, found), default=0) <= -(-len(found) // max(len(own), 1))

    data = load_dataset("json", data_files=str(target), split="train", cache_dir=str(tmp_path / "cache"))
    assert not any(value is None for row in data for value in row.values())
    model = SentenceTransformer(tiny().model, device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=8, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    )
    assert trainer.train().training_loss > 0


def test_a_row_that_nothing_can_fill_is_named(tmp_path):
    class Alone(Toy):
        """Two queries, one passage, which is relevant to both; one has another passage for its negative."""

        def rows(self):
            found = Toy(n=2).rows()
            found["examples"] = [
                {
                    "query_id": "q0",
                    "positive_id": "d0",
                    "negative_ids": ["d1"],
                    "positive_score": None,
                    "negative_scores": None,
                },
                {
                    "query_id": "q1",
                    "positive_id": "d0",
                    "negative_ids": [],
                    "positive_score": None,
                    "negative_scores": None,
                },
            ]
            return found

    made = materialize(Alone(n=2), str(tmp_path / "runs"), HERE)
    with pytest.raises(ConfigError, match="query 'q1' has no negatives"):
        export.to_sentence_transformers(made, str(tmp_path / "runs"), str(tmp_path / "rows.jsonl"))
