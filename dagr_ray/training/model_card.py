"""The model card of a trained retriever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dagr_ray import __version__
from dagr_ray.core.config import packed
from dagr_ray.core.markdown import code, markdown


def model_card(settings: dict[str, Any], summary: dict[str, Any]) -> str:
    """The model card with the model's sources and settings, and the front matter that model hubs read."""
    base, counts = settings["base"], summary["counts"]
    hyper = {
        k: v for k, v in settings.items() if k not in ("type", "fingerprint", "losses") and not isinstance(v, dict)
    }
    content = (
        f"revision {code(base['revision'])}" if base["revision"] else f"content {settings['base_identity']['model']}"
    )
    origins = sorted(set(_origins(packed(settings))))
    last = f"{summary['losses'][-1][1]:.4f}" if summary["losses"] else "not logged"
    negatives = ", ".join(f"{number:.2f} by {loss}" for loss, number in counts["effective_negatives"].items())
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [sentence-transformers, feature-extraction, retrieval, synthetic-queries]",
        "---",
        "",
        f"# {markdown(Path(base['model']).name)} trained on generated queries",
        "",
        f"Made by dagr-ray {__version__}, stage `train` with fingerprint `{settings['fingerprint']}`.",
        "",
        f"* base: {code(base['model'])}, {content}",
        *([f"* the first {base['layers']} layers"] if base["layers"] is not None else []),
        *([f"* layers re-initialised with seed {base['reinitialise']}"] if base["reinitialise"] is not None else []),
        *[f"* {kind}: {text}" for kind, text in origins],
        *[f"* {markdown(name)}: {code(source)}" for name, source in settings["sources"].items()],
        f"* examples: {counts['examples']}, with {counts['negatives']:.2f} negatives each on average",
        f"* steps: {counts['steps']} of {summary['samples'] / counts['steps']:.1f} examples",
        f"* effective negatives of a query: {negatives or 'none'}; padding: {counts['padding']:.1%} of the computed tokens",
        *_reads(settings, summary),
        *[f"* loss: {', '.join(f'{k} {v}' for k, v in loss.items())}" for loss in settings["losses"]],
        f"* loss at the end: {last}; {summary['train_s']:.0f} s of training",
        *_chosen(summary["dev"], counts),
        *[f"* {name}: {markdown(value)}" for name, value in hyper.items() if value is not None],
        "",
        "Training queries are machine-written if an engine is named above. Check the licences of the corpus, of the",
        "base and of the engine's model before you publish this one.",
        "",
    ]
    return "\n".join(lines)


def _reads(settings: dict[str, Any], summary: dict[str, Any]) -> Iterator[str]:
    """The prompts before queries and passages, and the number of tokens that are read."""
    for task, prompt in zip(("query", "passage"), summary["prompts"], strict=True):
        shown = code(json.dumps(prompt, ensure_ascii=False))
        yield f"* prompt before a {task}: " + (f"{shown}, from the model" if prompt else "none")
    for reads in sorted(set(summary["reads"])):
        trained = min(settings["max_length"], reads)
        yield f"* tokens read from a text: {trained} in training, {reads} in search and by this folder"


def _chosen(dev: list[tuple[int, float]], counts: dict[str, Any]) -> Iterator[str]:
    """The results on the dev set."""
    if dev:
        value_of, best = dict(dev), counts["best_step"]
        yield f"* nDCG@10 on the dev set: {value_of[0]:.4f} before, {value_of[best]:.4f} after {best} steps, which are kept"
        if not best:
            yield "* **this is the base as it was**: no step of the training was better on the dev set"


def _origins(value: Any) -> Iterator[tuple[str, str]]:
    """(kind, description) of the corpora, strategies and engines anywhere inside a stage's JSON."""
    if isinstance(value, list):
        for item in value:
            yield from _origins(item)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in ("strategy", "engine") and isinstance(inner, dict):
                model = f" with {code(inner['model'])}" if inner.get("model") else ""
                yield name, f"{markdown(inner.get('type'))}{model}"
            leaf = isinstance(inner, dict) and "type" in inner and not any(isinstance(v, dict) for v in inner.values())
            if name == "corpus" and leaf:
                yield "passages", " ".join(markdown(v) for v in inner.values() if isinstance(v, str))
            yield from _origins(inner)
