"""The layouts and formats in which collections come: each is read right, or refused with file, line and reason."""

import pytest

from dagr_ray.core.config import ConfigError
from dagr_ray.formats import beir
from dagr_ray.report import compare as comparing
from dagr_ray.stages.evaluate import as_qrels
from tests.support.layouts import (  # fmt: skip
    CORPUS,
    DOCS,
    HEAD,
    JUDGED,
    QRELS,
    QUERIES,
    REFUSED,
    RIGHT,
    TREC,
    classic,
    hugging_face,
    jsonl,
    judged_parquet,
    lines,
)

NUMBERED = {"d1": "11", "d2": "12", "7": "13", "q1": "1", "q2": "2", "3": "3"}
DROPPED_TITLES = {"MS MARCO's names"}


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


@pytest.mark.parametrize("name", RIGHT)
def test_a_layout_is_read_right(tmp_path, name):
    path = write(tmp_path / "set", RIGHT[name])
    data = beir.read(path)
    titled = [(i, "" if name in DROPPED_TITLES else t, x) for i, t, x in DOCS]
    assert sorted(tuple(r.values()) for r in data.tables["corpus"].to_pylist()) == sorted(titled)
    assert sorted(tuple(r.values()) for r in data.tables["queries"].to_pylist()) == sorted(QUERIES)
    expected = {"q1": {"d1": 1}, "q2": {"d2": 2, "7": 0}, "3": {"7": 1}}
    found = as_qrels(data.tables["qrels.test"])
    assert found == expected
    assert not data.unusable and not [p for p in data.problems if not p.repaired]
    assert comparing.load_judgements(path, "test").qrels == expected
    assert len(beir.content(path)) == 16


def numbered(rows):
    return [tuple(NUMBERED.get(cell, cell) for cell in row) for row in rows]


@pytest.mark.parametrize("mark", ["\t", " "])
def test_numbers_for_ids_do_not_hide_four_columns(tmp_path, mark):
    corpus = jsonl({"_id": int(i), "text": x} for i, _, x in [*numbered(DOCS), ("0", "", "nought"), ("1", "", "one")])
    asked = jsonl({"_id": int(i), "text": x} for i, x in numbered(QUERIES))
    files = classic(corpus=corpus, queries=asked, qrels=lines(numbered(TREC), mark))
    path = write(tmp_path / "set", files)
    expected = {"1": {"11": 1}, "2": {"12": 2, "13": 0}, "3": {"13": 1}}
    assert as_qrels(beir.read(path).tables["qrels.test"]) == expected
    assert comparing.load_judgements(path, "test").qrels == expected
    assert comparing.load_judgements(f"{path}/qrels/test.tsv", "test").qrels == expected


def test_two_columns_are_relevant_pairs_as_in_nanobeir(tmp_path):
    for number, qrels in enumerate(
        (lines([HEAD[:2], *((q, d) for q, d, _ in QRELS)]), lines([(q, d) for q, d, _ in QRELS]))
    ):
        assert comparing.load_judgements(write(tmp_path / f"{number}", classic(qrels=qrels)), "test").qrels["q2"] == {
            "d2": 1,
            "7": 1,
        }
    files = hugging_face(
        {"qrels/train-00000-of-00001.parquet": judged_parquet(names=HEAD[:2])},
        "corpus/train-00000-of-00001.parquet",
        "queries/train-00000-of-00001.parquet",
    )
    data = beir.read(write(tmp_path / "nano", files))
    assert as_qrels(data.tables["qrels.train"]) == {"q1": {"d1": 1}, "q2": {"d2": 1, "7": 1}, "3": {"7": 1}}


def test_negative_grades_and_ids_with_spaces_stay_as_they_are(tmp_path):
    corpus = jsonl([{"_id": "a b", "text": "one"}, {"_id": " c ", "text": "two"}, {"_id": "d\te", "text": "three"}])
    asked = jsonl([{"_id": "q 1", "text": "what"}])
    qrels = b'query-id\tcorpus-id\tscore\nq 1\ta b\t-1\nq 1\t c \t2\nq 1\t"d\te"\t3\n'
    data = beir.read(write(tmp_path, classic(corpus=corpus, queries=asked, qrels=qrels)))
    assert as_qrels(data.tables["qrels.test"]) == {"q 1": {"a b": -1, " c ": 2, "d\te": 3}}


@pytest.mark.parametrize("there", ["validation", "valid", "val", "dev"])
def test_dev_and_validation_are_one_split(tmp_path, there):
    path = write(tmp_path, classic(qrels={f"qrels/{there}.tsv": JUDGED}))
    for asked in ("dev", "validation"):
        assert len(comparing.load_judgements(path, asked).qrels) == 3
    with pytest.raises(ConfigError, match=f"no split 'test' in .*; allowed: {there}"):
        comparing.load_judgements(path, "test")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_for_certain_is_refused(tmp_path, name):
    files, said = REFUSED[name]
    path = write(tmp_path / "set", files)
    with pytest.raises(ConfigError, match=said) as refused:
        data = beir.read(path)
        assert "qrels.test" not in data.tables or not data.tables["qrels.test"].num_rows
        if data.unusable:
            raise ConfigError(data.unusable["test"])
        comparing.load_judgements(path, "test")
    assert "\n" not in str(refused.value)


def test_judgements_with_unknown_ids_are_counted(tmp_path, caplog):
    qrels = lines([HEAD, *QRELS, ("q1", "gone", 1), ("q9", "d1", 1), ("q8", "d1", 1)])
    data = beir.read(write(tmp_path, classic(qrels=qrels)))
    assert data.tables["qrels.test"].num_rows == 4
    assert beir.summarise_problems(data.problems) == [
        "qrels/test.tsv: 1 line skipped: unknown-document (line 6: gone)",
        "qrels/test.tsv: 2 lines skipped: unknown-query (line 7: q9)",
    ]


def test_a_split_that_is_not_used_does_not_decide(tmp_path):
    path = write(
        tmp_path, classic() | {"qrels/train.tsv": lines([HEAD, ("q1", "d1", 0.5)]), "qrels/dev.tsv": b"\xff\xfe\x00"}
    )
    data = beir.read(path)
    assert "qrels.test" in data.tables and "qrels.train" not in data.tables
    assert "score 0.5 is not a whole number" in data.unusable["train"] and "dev" in data.unusable
    assert len(comparing.load_judgements(path, "test").qrels) == 3


def test_a_file_in_place_of_its_folder_is_named_with_the_folder(tmp_path):
    path = write(tmp_path, classic())
    with pytest.raises(ConfigError, match=f"is a file; give the folder that contains it, '{path}'"):
        beir.content(f"{path}/corpus.jsonl")
    for address in ("s3://bucket/my set", "nothing://x/y"):
        with pytest.raises(ConfigError, match="is not a valid address"):
            beir.content(address)


def test_titles_without_a_text_become_texts(tmp_path):
    corpus = jsonl({"_id": f"p{i}", "title": f"only a title {i}", "text": None} for i in range(30)) + CORPUS
    data = beir.read(write(tmp_path, classic(corpus=corpus)))
    assert data.tables["corpus"].to_pylist()[3] == {"doc_id": "p3", "title": "", "text": "only a title 3"}
    assert beir.summarise_problems(data.problems) == [
        "corpus.jsonl: 30 lines repaired: empty-text (line 1: p0: the title is used as text)"
    ]
