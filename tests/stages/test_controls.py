"""What texts that are written should be like: how it is asked for, and how what misses it is found."""

import random

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, from_json, plugins
from dagr_ray.core.language import languages
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.pairs import Pairs
from dagr_ray.stages.rewrite import Rewrite
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._control_checks import first_violation
from dagr_ray.strategies._controls import LANGUAGES, LOCALES, Controls
from dagr_ray.strategies.hyde import Hyde
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.strategies.task_triple import TaskTriple
from dagr_ray.strategies.translate import Translate, TranslatePassage
from tests.conftest import tiny_beir
from tests.stages.test_creation import HERE, ROW, Says, asked, built, corpus

ANSWERS = {
    "How can a directory tree be copied with all of its files in Python?": "formal",
    "hey, how do I copy my folder and don't lose stuff": "casual",
    "copy folder": "broad",
    "Wie kopiere ich einen Ordner mit allem, was darin ist?": "german",
    "Comment copier un dossier avec tout ce qu'il contient ?": "french",
    "フォルダを中身ごとコピーするにはどうすればいいですか": "japanese",
}


@pytest.mark.parametrize(
    ("controls", "kept"),
    [
        ({"language": "en"}, {"formal", "casual", "broad"}),
        ({"language": "de-AT"}, {"german"}),
        ({"language": "fr"}, {"french"}),
        ({"language": "ja-JP"}, {"japanese"}),
        ({"length": (1, 4)}, {"broad"}),
        ({"formality": "formal"}, {"formal", "broad"}),
        ({"formality": "casual", "language": "en"}, {"casual"}),
        ({"specificity": "broad", "language": "en"}, {"broad"}),
        ({"specificity": "specific", "language": "en"}, {"formal", "casual"}),
        ({"language": "en-GB", "length": (8, 20), "formality": "formal", "specificity": "specific"}, {"formal"}),
    ],
)
def test_queries_that_miss_a_control_are_rejected(controls, kept):
    wanted = Controls(**controls)
    found = {kind: first_violation(wanted, text) for text, kind in ANSWERS.items()}
    if controls == {"formality": "formal"}:  # measured in English: the others are not asked about
        found = {kind: found[kind] for kind in ("formal", "casual", "broad")}
    assert {kind for kind, miss in found.items() if miss is None} == kept
    assert {miss[0] for miss in found.values() if miss} <= set(controls)


def test_parse_measures_what_strategies_were_asked_for(tmp_path):
    stage = asked(
        corpus(tmp_path / "set", ANSWERS), Promptagator(controls=Controls(language="en", length=(3, 30))), samples=1
    )
    _, lineage, parsed = built(stage, tmp_path / "runs")
    assert sorted(text for _, text in lineage.values()) == sorted(
        text for text, kind in ANSWERS.items() if kind in ("formal", "casual")
    )
    assert parsed.manifest["counts"]["rejected"] == {"control/language": 3, "control/length": 1}
    refused = parsed.read("rejected").to_pylist()
    assert {row["by"] for row in refused} == {"control"} and "2 words: copy folder" in {r["detail"] for r in refused}
    inputs = {name: inner.folder(str(tmp_path / "runs")) for name, inner in stage.inputs().items()}
    [prompt] = stage.prompts(inputs, ["d000"]).values()
    assert prompt.endswith("\nWanted: in English; 3 to 30 words\nQuery:")


# those whose texts are labels, copies or slips of a text have nothing to control
UNCONTROLLED = {"crop", "noisy", "prefix", "several", "critique", "llm-judge"}
WRITTEN = [cls for name, cls in sorted(plugins(Strategy).items()) if name not in UNCONTROLLED]


@pytest.mark.parametrize("strategy", WRITTEN, ids=lambda cls: cls.type)
def test_controls_follow_the_passage_and_are_fingerprinted(strategy):
    plain, controlled = strategy(), strategy(controls=Controls(language="pt-BR", formality=None))
    first, second = (one.prompt(ROW, (), random.Random(0)) for one in (plain, controlled))
    assert first.before == second.before and "Wanted" not in first.text
    assert "\nWanted: in Portuguese as in Brazil: 1.234,5, dates as 31/12/2025, reais\n" in second.after
    assert second.text.index("Wanted") > second.text.index(second.passage)
    assert plain.fingerprint() == strategy(controls=Controls()).fingerprint() != controlled.fingerprint()


def test_texts_written_for_pairs_are_measured_too(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "beir")))
    pairs, hyde = Pairs(queries=data, corpus=data, split="test", n=3), Hyde(controls=Controls(language="de"))
    found = {}
    for text in (
        "Copytree copies a directory with all that is in it.",
        "Copytree kopiert ein Verzeichnis mit allem Inhalt.",
    ):
        raw = Generate(corpus=pairs, strategy=hyde, engine=Says(text=text))
        made = materialize(Rewrite(generations=raw), str(tmp_path / "runs"), HERE)
        found[text[:10]] = made.manifest["counts"]["rejected"], made.count("corpus")
        assert raw.folder(str(tmp_path / "runs")).read("generations")["logprob"].to_pylist() == [-0.5] * 3
    assert found == {"Copytree c": ({"control/language": 3}, 0), "Copytree k": ({}, 3)}
    assert "\nWanted: in German\nPassage:" in hyde.prompt(ROW, (), random.Random(0)).text
    assert Hyde().fingerprint() == Hyde(controls=Controls()).fingerprint() != hyde.fingerprint()


def test_a_translation_is_measured_without_being_told_to(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "beir")))
    pairs, found = Pairs(queries=data, corpus=data, split="test", n=3), {}
    for strategy in (
        Translate(),
        TranslatePassage(),
        Translate(language="fr"),
        TaskTriple(controls=Controls(language="de")),
    ):
        asked = data if strategy.reads == "corpus" else pairs
        for text in ("Wie weit ist der Bernstein von der Birke entfernt, und wann wurde er zuerst gesehen?",
                     "How far is it from the amber to the birch, and when was it first seen there?"):  # fmt: skip
            said = f"a task\nQuery: {text}\nRight passage: {text} A\nWrong passage: {text} B" if asked is data else text
            raw = Generate(corpus=asked, strategy=strategy, engine=Says(text=said))
            made = materialize(Rewrite(generations=raw), str(tmp_path / "runs"), HERE)
            kept = made.manifest["counts"]["out"] > 0
            found.setdefault((strategy.type, strategy.effective_controls().language), []).append(kept)
            assert kept or set(made.manifest["counts"]["rejected"]) == {"control/language"}
    assert found == {
        ("translate", "de"): [True, False],
        ("translate-passage", "de"): [True, False],
        ("translate", "fr"): [False, False],
        ("task-triple", "de"): [True, False],
    }


def test_every_language_that_can_be_asked_for_can_be_found():
    assert set(LANGUAGES) <= set(languages())
    assert {tag.split("-")[0] for tag in LOCALES} <= set(LANGUAGES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"language": "de-FR"}, "de-FR.*allowed are de, de-AT, de-CH, de-DE"),
        ({"language": "klingon"}, "allowed are ar, bg"),
        ({"length": (5, 2)}, "swap them"),
        ({"length": (0, 2)}, "greater than or equal to 1"),
        ({"formality": "formal", "language": "de"}, "measured in English only"),
        ({"specificity": "specific", "length": (1, 3)}, "allows under 4 words"),
    ],
)
def test_controls_that_cannot_be_held_or_checked_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        from_json({"type": "controls", **fields}, Controls)
