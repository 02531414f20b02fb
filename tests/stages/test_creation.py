"""Strategies that go from a passage to queries: what is drawn for each sample, and what answers become."""

import argparse
import hashlib
import itertools
import json
import random
from collections import Counter
from typing import ClassVar

import pytest

from dagr_ray.cli.run import preview
from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines import Completion, Engine
from dagr_ray.engines.crop import CropEngine
from dagr_ray.prompts import Exemplar, Passage
from dagr_ray.stages.cloze import Cloze
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._controls import Controls
from dagr_ray.strategies.crop import Crop, without
from dagr_ray.strategies.inpars import Inpars
from dagr_ray.strategies.persona import PERSONAS, Persona
from dagr_ray.strategies.prefix import Prefix
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.strategies.several import Several
from dagr_ray.strategies.simplify import Simplify
from dagr_ray.strategies.translate import Translate, TranslatePassage
from dagr_ray.strategies.typed import FORMS, LABELS, Typed

HERE = Placement(generate=Pool(workers=0, shard_rows=7), light=Pool(workers=0, shard_rows=7))
ROW = Passage("d1", "shutil.copytree", "Recursively copy a directory tree. The destination must not exist.")


def corpus(path, texts):
    """A BEIR folder of passages without titles."""
    path.mkdir()
    rows = [{"_id": f"d{i:03}", "title": "", "text": text} for i, text in enumerate(texts)]
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "queries.jsonl").write_text("")
    return Beir(path=str(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    words = "amber basalt copper dune ember fjord glacier harbour island jungle".split()
    texts = [
        " ".join(f"The {a} {b} stands {i} miles from the old {c} in the north." for a, b, c in itertools.permutations(
            random.Random(i).sample(words, 3)
        ))
        for i in range(60)
    ]  # fmt: skip
    return corpus(tmp_path_factory.mktemp("creation") / "set", texts)


def asked(data, strategy, samples=3, **fields):
    return Generate(corpus=data, strategy=strategy, engine=CropEngine(), samples=samples, **fields)


def built(stage, runs, placement=HERE):
    """The completions and the lineage of their queries, by gen_id."""
    parsed = materialize(Parse(generations=stage, corpus=stage.corpus), str(runs), placement)
    rows = stage.folder(str(runs)).read("generations").to_pylist()
    queries = {row["query_id"]: row["text"] for row in parsed.read("queries").to_pylist()}
    lineage = {row["gen_id"]: (row["strategy"], queries[row["id"]]) for row in parsed.read("lineage").to_pylist()}
    return rows, lineage, parsed


class Says(Engine):
    """Answers every prompt with one text, in which {} is the sample's seed, for these tests."""

    abstract: ClassVar[bool] = True
    text: str

    def open(self, pool):
        return self

    def generate(self, prompts, seeds, sampling, n):
        texts = [[self.text.format(seed + i) for i in range(n)] for seed in seeds]
        assert len(texts) == len(prompts)
        return [[Completion(text, "stop", 1, 0, 1, logprob=-0.5) for text in row] for row in texts]

    def close(self):
        pass


# -- what is drawn for each sample ----------------------------------------------------------------------------------------


def test_each_sample_has_its_form_and_lineage_names_it(data, tmp_path):
    stage = asked(data, Typed())
    rows, lineage, _ = built(stage, tmp_path)
    assert len(rows) == 180 and [row["sample"] for row in rows[:6]] == [0, 1, 2, 0, 1, 2]
    assert len({row["seed"] for row in rows}) == 180 and rows[2]["seed"] - rows[0]["seed"] == 2
    inputs = {name: inner.folder(str(tmp_path)) for name, inner in stage.inputs().items()}
    prompts = [stage.prompts(inputs, [row["source_id"] for row in rows], sample) for sample in range(3)]
    for row in rows:
        prompt = prompts[row["sample"]][row["source_id"]]
        assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == row["prompt_sha"]
        form = lineage[row["gen_id"]][0].removeprefix("typed/")
        assert prompt.endswith(f"\n{LABELS[form]}:")
    seen = Counter(name for name, _ in lineage.values())
    assert set(seen) == {f"typed/{form}" for form in FORMS} and min(seen.values()) >= 12
    # spread over the forms: the samples of one passage hardly ever share one
    alone = [len({lineage[row["gen_id"]][0] for row in rows[i : i + 3]}) for i in range(0, 180, 3)]
    assert alone.count(3) > 50


def test_drawn_forms_do_not_depend_on_the_shards(data, tmp_path):
    stage = asked(data, Persona(), samples=2)
    wide = Placement(generate=Pool(workers=0, shard_rows=100), light=Pool(workers=0, shard_rows=100))
    _, found, _ = built(stage, tmp_path / "a")
    _, again, _ = built(stage, tmp_path / "b", wide)
    assert found == again and len({name for name, _ in found.values()}) == len(PERSONAS)


def test_strategies_with_and_without_drawn_forms_combine(data, tmp_path):
    strategies = (Promptagator(), Typed(mix={"claim": 1, "title": 1}), Crop(mode="span"))
    rows, lineage, _ = built(asked(data, Several(strategies=strategies), samples=2), tmp_path)
    names = [lineage[row["gen_id"]][0] for row in rows]
    for i in range(0, len(names), 6):
        assert names[i : i + 2] == ["promptagator"] * 2 and names[i + 4 : i + 6] == ["crop/span"] * 2
        assert sorted(names[i + 2 : i + 4]) == ["typed/claim", "typed/title"]


def test_a_strategy_without_drawn_forms_keeps_its_prompts(data):
    # fields that came after version 2 (words of any script) change no fingerprint: what was paid for stays
    assert Promptagator().fingerprint() == "bec477ff4426" and Crop().fingerprint() == "48381cea9c90"
    assert asked(data, Promptagator()).per_request() == 3 and asked(data, Typed(form="claim")).per_request() == 3
    assert asked(data, Typed()).per_request() == asked(data, Several(strategies=(Crop(), Persona()))).per_request() == 1


@pytest.mark.parametrize(
    "strategy", [Promptagator(), Typed(), Several(strategies=(Crop(), Persona()))], ids=lambda s: s.type
)
def test_the_engine_draws_each_sample_with_the_seed_of_its_row(data, tmp_path, strategy):
    stage = Generate(corpus=data, strategy=strategy, engine=Says(text="seed {} it is"), samples=2)
    rows, _, _ = built(stage, tmp_path)
    assert len({row["seed"] for row in rows}) == len(rows)
    assert [row["raw"] for row in rows] == [f"seed {row['seed']} it is" for row in rows]


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_forms_have_the_shares_of_their_weights(samples):
    typed = Typed(mix={"question": 5, "keywords": 3, "error-message": 2})
    seen = Counter(one.form for seed in range(2000) for one in typed.strategies_for(random.Random(seed), samples))
    for form, weight in typed.mix.items():
        assert abs(seen[form] / (2000 * samples) - weight / 10) < 0.03
    # every sample has the mix, not only all of a passage's together
    first = Counter(typed.strategies_for(random.Random(seed), samples)[0].form for seed in range(2000))
    assert abs(first["question"] / 2000 - 0.5) < 0.05


def test_prompts_of_a_passage_share_their_prefix():
    prompts = [one.prompt(ROW, (), random.Random(0)) for one in Typed().strategies_for(random.Random(0), 20)]
    assert len({prompt.before + prompt.passage for prompt in prompts}) == 1 and len({p.after for p in prompts}) == 7
    shown = Typed(mix={"claim": 1, "title": 1}).prompt(ROW, (), random.Random(0)).before
    assert "Claim:" in shown and "Title:" in shown and "Keywords:" not in shown


@pytest.mark.parametrize("mix", [{}, {"claim": 0}, {"claim": -1, "title": 2}, {"clam": 1}, {"claim": "much"}])
def test_a_mix_that_is_none_is_refused(mix):
    with pytest.raises(ConfigError, match=r"mix = .*give weights of at least 0"):
        from_json({"type": "typed", "mix": mix}, Strategy)


def test_no_searcher_comes_twice_before_all_have_come():
    drawn = Persona().strategies_for(random.Random(3), len(PERSONAS) + 2)
    names = [one.name() for one in drawn]
    assert len(set(names[: len(PERSONAS)])) == len(PERSONAS) == len(set(names))
    own = from_json(
        {"type": "persona", "personas": [{"profession": "Deep-sea Diver", "skill": "a", "goal": "b"}]}, Strategy
    )
    assert own.name() == "persona/deep-sea-diver" and not own.per_sample()
    prompt = own.prompt(ROW, (), random.Random(0))
    assert prompt.passage.startswith("Deep-sea Diver, a, b\nPassage: shutil") and prompt.after == "\nQuery:"


# -- what answers become: recorded from larger models, where the small one fails ------------------------------------------


RECORDED = [
    (Inpars(), " {}\n\nExample 5:", "how to copy a directory recursively in python"),
    (Inpars(form="gbq"), " {}\nBad Question: copytree", "Does copytree fail where the destination exists?"),
    (Inpars(form="gbq"), 'Good Question: "{}"', "What does copytree copy?"),
    (Typed(form="question"), " {}\nKeywords: copy", "How do I copy a directory tree?"),
    (Typed(form="keywords"), "\nKeywords: {}", "copytree destination exists"),
    (Typed(form="claim"), " **Claim:** {}", "copytree refuses an existing destination."),
    (Typed(form="title"), "Title: {}", "Copying Directory Trees in Python"),
    (Typed(form="situation"), " {}", "I have to back up a project folder before each release."),
    (Typed(form="conversational"), "Chat: {}", "and what if the target is already there?"),
    (Typed(form="error-message"), " {}", "FileExistsError: [Errno 17] File exists: '/tmp/backup'"),
    (Typed(form="error-message"), "Error message: `{}`", "'copytree' is not defined"),
    (Persona(), " {}\nSearcher: nurse, ...", "copy a whole folder in python without losing files"),
    (Promptagator(controls=Controls(language="de")), " {}", "Wie kopiere ich einen Ordner?"),
    (
        Simplify(),
        " {}\nPassage: next",
        "It copies a folder with all that is in it. There must be no folder of that name yet.",
    ),
    (Simplify(), 'In plain words: "{}"', "It makes a copy of a folder and of all folders in it."),
    (Translate(), " {}\nEnglish: next", "wie kopiere ich einen Ordner"),
    (Translate(language="fr"), 'French: "{}"', "comment copier un dossier"),
    (Translate(language="es"), " {}", "cómo copiar una carpeta"),
    (TranslatePassage(), " {}", "Kopiert einen Ordner mit allem, was darin ist. Das Ziel darf nicht vorhanden sein."),
    (
        TranslatePassage(language="fr"),
        "French: {}",
        "Copie un dossier et tout ce qu'il contient. La cible ne doit pas exister.",
    ),
]


@pytest.mark.parametrize(("strategy", "around", "kept"), RECORDED)
def test_answers_of_the_right_form_are_read(strategy, around, kept):
    assert strategy.parse(ROW._replace(query="how do I copy a folder"), around.format(kept)).kept == [kept]


@pytest.mark.parametrize(
    ("strategy", "raw", "reason"),
    [
        (Inpars(form="gbq"), "Bad Question: copytree", "bad-question"),
        (Inpars(), "Why is the sum of floats not exact in python", "exemplar-copy"),
        (Typed(form="claim"), "Claim:", "empty"),
        (Typed(form="title"), "Passage: shutil.copytree", "template"),
        (Typed(form="error-message"), "OSError", "too-short"),
        (Typed(form="error-message"), "e4 sensor", "exemplar-copy"),
        (Persona(), "When can I run again after a mild ankle sprain", "exemplar-copy"),
    ],
)
def test_answers_of_another_form_are_refused_with_the_reason(strategy, raw, reason):
    assert [found for found, _ in strategy.parse(ROW, raw).rejected] == [reason]


def test_the_exemplars_of_inpars_are_its_own():
    shown = (Exemplar("A passage of the data set.", "a query of the data set"),)
    for form in ("vanilla", "gbq"):
        text = Inpars(form=form).prompt(ROW, shown, random.Random(0)).text
        assert "data set" not in text and text.count("Document:") == 4
        assert text.count("Bad Question:") == (3 if form == "gbq" else 0)


# -- prefixes ---------------------------------------------------------------------------------------------------------------


def cuts(prefix, query, draws=500):
    return [prefix.cut(query, random.Random(seed)) for seed in range(draws)]


def test_prefixes_have_the_given_lengths():
    query = "how to copy a folder with everything in it"
    for made in cuts(Prefix(), query):
        assert query.startswith(made) and 2 <= len(made) < len(query) and made == made.strip()
    sizes = Counter(map(len, cuts(Prefix(lengths=(9, 9, 0, 0, 1, 3)), "abcdefghijkl")))
    assert set(sizes) == {5, 6} and 0.65 < sizes[6] / 500 < 0.85  # 1 and 2 are under min_characters
    assert cuts(Prefix(), "abc", 1) == [""] and cuts(Prefix(lengths=(0,) * 20 + (1,)), query[:20], 1) == [""]
    assert cuts(Prefix(lengths=(0, 0, 0, 1)), "cafe\u0301 au lait", 1) == ["cafe\u0301"]


def test_lengths_come_from_a_log_known_by_its_content(tmp_path):
    log = tmp_path / "log.tsv"
    # short queries are typed to the end, long ones are not
    log.write_text("".join(f"{'x' * 8}\t{'x' * 10}\n{'y' * 10}\t{'y' * 50}\n" for _ in range(100)))
    prefix = Prefix(log=str(log))
    assert set(map(len, cuts(prefix, "abcdefghij"))) == {8}
    assert set(map(len, cuts(prefix, "a" * 50))) == {10} and set(map(len, cuts(prefix, "a" * 60))) == {12}
    before = prefix.fingerprint()
    (tmp_path / "copy.tsv").write_bytes(log.read_bytes())
    assert Prefix(log=str(tmp_path / "copy.tsv")).fingerprint() == before
    log.write_text("howto\nhow to copy\n")
    assert prefix.fingerprint() != before and set(map(len, cuts(prefix, "a" * 9))) == {5}
    assert set(map(len, cuts(prefix, "a" * 30))) == {5, 11}
    for text, words in (("\n \n", "no line with a prefix"), (None, "no file")):
        log.unlink() if text is None else log.write_text(text)
        with pytest.raises(ConfigError, match=words):
            cuts(prefix, "abcdefgh", 1)


def test_prefixes_of_real_and_of_generated_queries(tmp_path):
    queries = [f"how to fold paper plane number {i} for the contest" for i in range(30)]
    log = corpus(tmp_path / "queries", queries)
    _, real, _ = built(asked(log, Prefix(of=None), samples=4), tmp_path / "runs")
    text_of = {f"d{i:03}": query for i, query in enumerate(queries)}
    rows = asked(log, Prefix(of=None), samples=4).folder(str(tmp_path / "runs")).read("generations").to_pylist()
    assert len(real) == 120 and {name for name, _ in real.values()} == {"prefix"}
    assert all(text_of[row["source_id"]].startswith(real[row["gen_id"]][1]) for row in rows)
    assert len({len(text) for _, text in real.values()}) > 20  # each sample is cut anew
    _, made, _ = built(asked(log, Prefix(of=Several(strategies=(Typed(), Crop()))), samples=2), tmp_path / "runs")
    names = Counter(name.split("/")[1] for name, _ in made.values())
    assert names == {"typed": 60, "crop": 60} and max(len(text) for _, text in made.values()) < len(queries[-1])


def test_prefixes_that_make_no_sense_are_refused(tmp_path):
    for fields, words in (
        ({"log": "x", "lengths": (1,)}, "remove one of them"),
        ({"lengths": (0, 0)}, "no weight over 0"),
        ({"of": Promptagator(controls=Controls(length=(1, 3)))}, "apply to complete queries"),
        ({"of": {"type": "hyde"}}, "give a strategy that writes queries"),
    ):
        with pytest.raises(ValueError, match=words):
            Prefix(**fields)
    assert Prefix(of=None).parse(ROW, "  ").rejected == [("empty", "")]
    assert [r for r, _ in Prefix().parse(ROW, "a b").rejected] == ["too-short"]


# -- crops ------------------------------------------------------------------------------------------------------------------


def test_spans_are_drawn_anywhere_for_each_sample(data, tmp_path):
    rows, lineage, _ = built(asked(data, Crop(mode="span"), samples=4), tmp_path)
    text_of = {row["doc_id"]: row["text"] for row in data.folder(str(tmp_path)).read("corpus").to_pylist()}
    shares, spans = [], set()
    for row in rows:
        name, text = lineage[row["gen_id"]]
        assert name == "crop/span" and text in text_of[row["source_id"]] and row["logprob"] is None
        shares.append(len(text.split()) / len(text_of[row["source_id"]].split()))
        spans.add(text)
    assert 0.04 <= min(shares) < 0.1 and 0.4 < max(shares) <= 0.51 and len(spans) > 230


def test_inverse_cloze_takes_sentences_out_of_the_positives(tmp_path):
    whole = "The first sentence tells of amber and salt. The second sentence tells of copper and rain in the far north."
    data = corpus(
        tmp_path / "set", [whole, "There is only one sentence in this passage.", "A whole passage. Is short."]
    )
    stage = asked(data, Crop(mode="inverse-cloze"), samples=2)
    _, lineage, parsed = built(stage, tmp_path / "runs")
    assert {name for name, _ in lineage.values()} == {"crop/inverse-cloze"}
    assert parsed.manifest["counts"]["rejected"] == {"parse/nothing-left": 4}
    taken = {text for _, text in lineage.values()}
    assert len(taken) == 2  # either leaves enough, both would leave nothing
    made = materialize(
        Cloze(corpus=data, selected=Parse(generations=stage, corpus=data), keep=0.0), str(tmp_path / "runs"), HERE
    )
    texts = made.read("corpus")["text"].to_pylist()
    assert texts[1:] == data.folder(str(tmp_path / "runs")).read("corpus")["text"].to_pylist()[1:]
    assert texts[0] in {without(text, whole) for text in taken} and made.manifest["counts"]["removed"] == 1
    kept = Cloze(corpus=data, selected=Parse(generations=stage, corpus=data), keep=1.0)
    assert materialize(kept, str(tmp_path / "runs"), HERE).read("corpus")["text"][0].as_py() == whole
    assert tables.check("corpus", made.read("corpus")).num_rows == 3


JOB = """
from dagr_ray.engines.crop import CropEngine
from dagr_ray.core.stage import Stage
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.strategies.typed import Typed

def job(data: str) -> Stage:
    corpus = Beir(path=data)
    raw = Generate(corpus=corpus, strategy=Typed(), engine=CropEngine(), samples=2)
    return Parse(generations=raw, corpus=corpus)
"""


def test_preview_shows_the_prompt_of_each_sample(data, tmp_path, capsys):
    (tmp_path / "job.py").write_text(JOB)
    preview(argparse.Namespace(job=str(tmp_path / "job.py"), values=[f"data={data.path}"], rows=1))
    _, *samples = capsys.readouterr().out.split("=== ")
    assert len(samples) == 2 and all("--- sample" in text and "    -> ['The " in text for text in samples)
    first, second = (text.partition("--- sample")[0].strip() for text in samples)
    assert first.rpartition("\n")[0] == second.rpartition("\n")[0] and first != second
