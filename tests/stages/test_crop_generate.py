"""Generation from end to end without a model: ids, resume, bytes, in one process and through Ray."""

import random
import re
import time
from pathlib import Path

import pytest

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.core.stage import StageFailed
from dagr_ray.engines import Completion, Engine, Sampling
from dagr_ray.engines.crop import CropEngine, sentences
from dagr_ray.prompts import Prompt
from dagr_ray.stages.exemplars import Exemplars
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.strategies.several import Several
from tests.conftest import tiny_beir

HERE = Placement(generate=Pool(workers=0, shard_rows=16))


@pytest.fixture
def data(tmp_path):
    return Beir(path=str(tiny_beir(tmp_path / "beir")))


def crops(data, **fields):
    fields = {"strategy": Crop(), "engine": CropEngine(), "samples": 2} | fields
    return Generate(corpus=data, **fields)


def parts(folder):
    return {part["file"]: part["sha256"] for entry in folder.manifest["tables"].values() for part in entry["parts"]}


def test_crop_engine_gives_each_sample_another_sentence():
    prompt = Prompt("", "One two three four. Five six seven eight. Nine ten eleven twelve.", "")
    session = CropEngine().open(Pool())
    [answer] = session.generate([prompt], [5], Sampling(), 4)
    texts = [completion.raw for completion in answer]
    assert len(set(texts[:3])) == 3 and texts[3] == texts[0]
    assert texts == [c.raw for c in session.generate([prompt], [5], Sampling(), 4)[0]]
    drawn = {session.generate([prompt], [seed], Sampling(), 1)[0][0].raw for seed in range(30)}
    assert len(drawn) == 3
    assert all(c.prompt_tokens == c.completion_tokens == 0 and c.error is None for c in answer)


@pytest.mark.parametrize("text", ["", " ", "\x00", "...", "a" * 100_000, "一二三。四五六。", "x\n\n\ny"])
def test_crop_engine_answers_any_passage(text):
    [[completion]] = CropEngine().open(Pool()).generate([Prompt("", text, "")], [1], Sampling(), 1)
    assert isinstance(completion.raw, str)


def test_long_sentences_become_spans():
    assert [len(s.split()) for s in sentences("word " * 70)] == [32, 32, 6]


def test_sentences_end_where_they_always_did():
    # the definition, slower than what the engine does
    end = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?![a-z])|(?<=[!?])|\n\s*\n")
    signs = [*" \n\t.!?\"')]aAb\u00a01,", "ab ", "The "]
    dice = random.Random(3)
    for _ in range(5000):
        text = "".join(dice.choices(signs, k=dice.randrange(30)))
        spans = [" ".join(words) for piece in end.split(text) if (words := piece.split())]
        assert sentences(text, min_words=1) == spans, repr(text)


def test_the_order_of_sentences_is_drawn_with_the_seed_alone():
    text = " ".join(f"Sentence number {i} is here." for i in range(9))
    prompts = [Prompt("", text, "")] * 20
    for seed, answer in enumerate(CropEngine().open(Pool()).generate(prompts, range(20), Sampling(), 11)):
        order = sentences(text)
        random.Random(seed).shuffle(order)
        assert [completion.raw for completion in answer] == [*order, *order[:2]]


def test_crop_engine_is_fast_enough_for_millions_of_passages():
    prompts = [
        Prompt("", f"The first sentence has number {i}. The second one is here. A third.", "") for i in range(5000)
    ]
    began = time.process_time()
    CropEngine().open(Pool()).generate(prompts, list(range(5000)), Sampling(), 2)
    assert 5000 / (time.process_time() - began) > 5000  # rows a second; about 60,000 on an idle core


def test_ids_seeds_counts_and_lineage(data, tmp_path):
    stage = crops(data)
    folder = materialize(stage, str(tmp_path / "runs"), HERE)
    rows = folder.read("generations").to_pylist()
    assert len(rows) == 120 and len({row["gen_id"] for row in rows}) == 120
    first = rows[0]
    assert first["gen_id"] == tables.id_of(stage.fingerprint(), "d0", 0)
    assert [row["seed"] for row in rows[:2]] == [tables.seed_of(stage.fingerprint(), "d0") + i for i in range(2)]
    counts = folder.manifest["counts"]
    assert (counts["in"], counts["out"], counts["errors"], counts["truncated"]) == (60, 120, 0, 0)
    assert {"prompt_tokens", "cached_tokens", "completion_tokens", "engine_start_s", "generate_s"} <= set(
        folder.manifest["cost"]
    )

    parsed = materialize(Parse(generations=stage, corpus=data), str(tmp_path / "runs"), HERE)
    queries, qrels, lineage = (parsed.read(name).to_pylist() for name in ("queries", "qrels", "lineage"))
    assert len(queries) == len(qrels) == len(lineage) == 120
    gen = {row["gen_id"]: row for row in rows}
    for query, judged, origin in zip(queries, qrels, lineage, strict=True):
        assert query["query_id"] == judged["query_id"] == origin["id"] == tables.id_of(origin["gen_id"], 0)
        assert judged["doc_id"] == origin["source_id"] == gen[origin["gen_id"]]["source_id"]
        assert query["text"] == gen[origin["gen_id"]]["raw"] and judged["relevance"] == 1


def test_parse_gives_the_same_rows_in_any_number_of_shards(data, tmp_path):
    runs = str(tmp_path)
    stage = Parse(generations=crops(data), corpus=data)
    folder = materialize(stage, runs, HERE)
    made = {name: folder.read(name).combine_chunks() for name in stage.outputs}
    shards = {}
    # 40 rows are more than a shard of the completions (32), 100 are three of them, 1 is less than one
    for step in (1, 40, 100, 1000):
        other = Path(runs, f"of-{step}")
        (other / crops(data).folder_name()).parent.mkdir()
        for inner in (data, crops(data)):
            (other / inner.folder_name()).symlink_to(Path(runs, inner.folder_name()))
        again = materialize(stage, str(other), Placement(light=Pool(shard_rows=step)))
        assert {name: again.read(name).combine_chunks() for name in stage.outputs} == made
        assert again.manifest["counts"] == folder.manifest["counts"]
        shards[step] = [shard["stop"] for shard in again.read_json("plan.json")["shards"]]
    assert shards == {1: [32, 64, 96, 120], 40: [32, 64, 96, 120], 100: [96, 120], 1000: [120]}


def test_parse_reads_only_the_passages_of_its_shard(data, tmp_path):
    source, answers = Artifact(str(tmp_path), "source"), Artifact(str(tmp_path), "answers")
    stage = crops(data)
    run, made = stage.open({"corpus": source}, answers, Pool()), {"corpus": [], "generations": []}
    for shard in range(3):
        rows = [
            {"doc_id": f"d{i}", "title": "", "text": f"This is number {i}."} for i in range(shard * 4, shard * 4 + 4)
        ]
        made["corpus"].append(source.commit(shard, {"corpus": tables.table("corpus", rows)}, {})["tables"]["corpus"])
        source.write_json("manifest.json", {"tables": {"corpus": {"parts": made["corpus"]}}})
        output = run(shard * 4, shard * 4 + 4)
        made["generations"].append(answers.commit(shard, output.tables, {})["tables"]["generations"])
    answers.write_json("plan.json", {"shards": [{"start": i, "stop": i + 4} for i in (0, 4, 8)]})
    answers.write_json("manifest.json", {"tables": {"generations": {"parts": made["generations"]}}})
    for other in (0, 2):
        source.remove(made["corpus"][other]["file"])
        answers.remove(made["generations"][other]["file"])
    inputs = {"corpus": source, "generations": answers}
    output = Parse(generations=stage, corpus=data).open(inputs, Artifact(str(tmp_path), "made"), Pool())(8, 16)
    assert output.tables["qrels"]["doc_id"].to_pylist() == [f"d{i}" for i in range(4, 8) for _ in range(2)]


@pytest.mark.cluster
def test_ray_gives_the_same_bytes_as_one_process(data, tmp_path):
    import ray

    stage = crops(data)
    alone = materialize(stage, str(tmp_path / "alone"), HERE)
    connect()
    try:
        pool = Pool(workers=2, cpus=0.5, shard_rows=16)
        spread = materialize(stage, str(tmp_path / "spread"), Placement(generate=pool))
    finally:
        ray.shutdown()
    assert parts(alone) == parts(spread) and len(parts(alone)) == 8
    # another sharding: other parts, the same rows
    whole = materialize(stage, str(tmp_path / "whole"), Placement(generate=Pool(workers=0, shard_rows=1000)))
    assert whole.read("generations").equals(alone.read("generations").combine_chunks())


def test_resume_does_only_what_is_missing(data, tmp_path):
    stage = crops(data)
    folder = materialize(stage, str(tmp_path / "runs"), HERE)
    before = parts(folder)
    folder.revoke([2])
    again = materialize(stage, str(tmp_path / "runs"), HERE)
    assert parts(again) == before
    attempts = {shard: receipt["attempt"] for shard, receipt in again.receipts().items()}
    assert attempts == {0: 1, 1: 1, 2: 2, 3: 1}


def test_exemplars_are_human_short_distinct_and_held_out(data, tmp_path):
    runs = str(tmp_path / "runs")
    shown = Exemplars(corpus=data, k=5, max_words=12)
    rows = materialize(shown, runs, HERE).read("exemplars").to_pylist()
    assert len(rows) == 5 == len({row["doc_id"] for row in rows})
    assert {row["query_id"] for row in rows} <= {f"q{i}" for i in range(12)}, "from the dev split alone"
    assert all(len(row["passage"].split()) <= 12 for row in rows)
    folder = materialize(crops(data, strategy=Promptagator(), exemplars=shown), runs, HERE)
    held = {row["doc_id"] for row in rows}
    assert not held & set(folder.read("generations")["source_id"].to_pylist())
    assert {row["id"] for row in folder.read("rejected").to_pylist()} == held
    assert folder.manifest["counts"]["rejected"] == {"exemplar/held-out": 5}
    other = materialize(Exemplars(corpus=data, k=5, seed=1, max_words=12), runs, HERE).read("exemplars")
    assert other["query_id"].to_pylist() != [row["query_id"] for row in rows]


def test_no_such_split_means_no_exemplars(data, tmp_path):
    folder = materialize(Exemplars(corpus=data, split="train"), str(tmp_path), HERE)
    assert folder.count("exemplars") == 0
    stage = crops(data, strategy=Promptagator(), exemplars=Exemplars(corpus=data, split="train"))
    assert materialize(stage, str(tmp_path), HERE).count("generations") == 120


def test_exemplars_fall_back_to_another_split(data, tmp_path):
    runs = str(tmp_path)
    fallen = materialize(Exemplars(corpus=data, split="train", otherwise="dev", k=3), runs, HERE).read("exemplars")
    assert fallen.equals(materialize(Exemplars(corpus=data, k=3), runs, HERE).read("exemplars")) and len(fallen) == 3
    first = materialize(Exemplars(corpus=data, k=3, otherwise="test"), runs, HERE).read("exemplars")
    assert first.equals(fallen), "the first split is there"
    assert "otherwise" not in Exemplars(corpus=data).identity()


def test_preview_prompts_are_those_that_are_sent(data, tmp_path):
    import hashlib

    stage = crops(data, strategy=Promptagator(), exemplars=Exemplars(corpus=data, k=3))
    folder = materialize(stage, str(tmp_path), HERE)
    inputs = {name: inner.folder(str(tmp_path)) for name, inner in stage.inputs().items()}
    sent = folder.read("generations").to_pylist()[0]
    text = stage.prompts(inputs, [sent["source_id"]])[sent["source_id"]]
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == sent["prompt_sha"]


def test_an_empty_passage_is_rejected_before_it_is_paid_for(data, tmp_path):
    rows = [
        {"doc_id": "full", "title": "", "text": "A whole sentence."},
        {"doc_id": "blank", "title": "", "text": " \n"},
    ]
    source = Artifact(str(tmp_path), "source")
    part = source.commit(0, {"corpus": tables.table("corpus", rows)}, {})["tables"]["corpus"]
    source.write_json("manifest.json", {"tables": {"corpus": {"parts": [part]}}})
    output = crops(data).open({"corpus": source}, Artifact(str(tmp_path), "made"), Pool())(0, 2)
    assert output.tables["generations"]["source_id"].to_pylist() == ["full", "full"]
    assert output.counts["rejected"] == {"generate/empty-passage": 1} and output.counts["in"] == 2


class Broken(Engine):
    """Fails for every passage with an odd number."""

    abstract = True

    def open(self, pool):
        return self

    def close(self):
        pass

    def generate(self, prompts, seeds, sampling, n):
        bad = Completion(None, None, 0, 0, 0, error="boom \x00")
        good = Completion("a good query \x00 here", "stop", 3, 0, 2)
        return [
            [bad if "d1" in p.passage or int(p.passage.split("number ")[1].split(".")[0]) % 2 else good] * n
            for p in prompts
        ]


def test_errors_are_rows_and_too_many_of_them_fail_the_stage(data, tmp_path):
    stage = crops(data, engine=Broken(), samples=2)
    with pytest.raises(StageFailed, match="30 of 60 rows failed"):
        materialize(stage, str(tmp_path / "runs"), HERE)


def test_errors_under_the_limit_become_rejections(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Generate, "max_error_rate", 0.9)
    stage = crops(data, engine=Broken(), samples=2)
    runs = str(tmp_path / "runs")
    folder = materialize(stage, runs, HERE)
    assert folder.manifest["counts"]["errors"] == 30 and folder.manifest["counts"]["out"] == 60
    assert folder.manifest["cost"]["prompt_tokens"] == 30 * 3 and folder.manifest["cost"]["completion_tokens"] == 60 * 2
    parsed = materialize(Parse(generations=stage, corpus=data), runs, HERE)
    assert parsed.manifest["counts"]["rejected"] == {"generate/error": 60}
    assert all("\x00" not in row["text"] for row in parsed.read("queries").to_pylist())


def test_a_changed_parser_does_not_generate_again(data, monkeypatch):
    generated = crops(data)
    before = generated.fingerprint(), Parse(generations=generated, corpus=data).fingerprint()
    monkeypatch.setattr(Crop, "parse_version", 99)
    assert generated.fingerprint() == before[0]
    assert Parse(generations=generated, corpus=data).fingerprint() != before[1]
    monkeypatch.setattr(Crop, "version", 99)
    assert generated.fingerprint() != before[0]


def test_mistakes_are_found_when_the_stage_is_made(data, tmp_path):
    with pytest.raises(ValueError, match="temperature 0"):
        crops(data, sampling=Sampling(temperature=0), samples=2)
    other = Beir(path=str(tiny_beir(tmp_path / "other", docs=30)))
    with pytest.raises(ValueError, match="give that one"):
        Parse(generations=crops(data), corpus=other)
    assert issubclass(ConfigError, ValueError)


def test_several_strategies_ask_each_passage_side_by_side(data, tmp_path):
    import hashlib

    first, second = Promptagator(task="Say it in keywords.", task_last=True), Crop()
    stage = crops(data, strategy=Several(strategies=(first, second)), samples=2)
    folder = materialize(stage, str(tmp_path), HERE)
    rows = folder.read("generations").to_pylist()
    assert [row["sample"] for row in rows[:8]] == [0, 1, 2, 3] * 2 and len(rows) == 4 * 60
    assert len({row["gen_id"] for row in rows}) == 240
    assert [row["seed"] - rows[0]["seed"] for row in rows[:4]] == [0, 1, 2, 3]
    assert folder.manifest["counts"]["in"] == 60 and folder.manifest["counts"]["out"] == 240
    inputs = {name: inner.folder(str(tmp_path)) for name, inner in stage.inputs().items()}
    for sample in range(4):
        row = rows[sample]
        text = stage.prompts(inputs, [row["source_id"]], sample)[row["source_id"]]
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == row["prompt_sha"]
        assert ("Say it in keywords." in text) == (sample < 2)
    parsed = materialize(Parse(generations=stage, corpus=data), str(tmp_path), HERE)
    by = {row["gen_id"]: row["strategy"] for row in parsed.read("lineage").to_pylist()}
    assert by == {row["gen_id"]: ("promptagator", "crop")[row["sample"] // 2] for row in rows}
    with pytest.raises(ValueError, match="give at least one"):
        Several(strategies=())
