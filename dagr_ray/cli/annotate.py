"""The verb ``dagr annotate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from dagr_ray.annotation.export import FILES, export
from dagr_ray.annotation.import_ import import_ratings, text
from dagr_ray.annotation.sampling import REASONS
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.terminal import say
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder

Find = Callable[[str], Artifact]


def run(args: argparse.Namespace, find: Find) -> None:
    """The verb. ``words`` are folders of the runs folder, followed by the folder to write to or the files to read."""
    folders, files = list(args.words), []
    if args.action == "import":
        files = [word for word in args.words if word.lower().endswith((".jsonl", ".csv"))]
        folders = [word for word in args.words if word not in files]
    elif len(folders) > 1:
        files.append(folders.pop())
    if not folders or not files:
        missing = "a folder to write to" if args.action == "export" else "files of ratings (.jsonl or .csv)"
        raise ConfigError(
            f"annotate {args.action} {' '.join(args.words)}: give folders of the runs folder, and after them {missing}"
        )
    artifacts = [find(name) for name in folders]
    if args.action == "import":
        folder, report = import_ratings(artifacts, files, args.runs, args.threshold)
        say(json.dumps(report, indent=1, ensure_ascii=False) if args.json else text(report))
        say(folder.path, to=sys.stderr if args.json else sys.stdout)
        return
    encoder = None
    if args.encoder:
        model = str(minilm()) if args.encoder == "minilm" else args.encoder
        encoder = Encoder(model=model)
    people = find(args.people) if args.people else None
    counts = export(artifacts, files[0], args.items, args.threshold, encoder, people)
    if args.json:
        say(json.dumps(counts))
        return
    say("; ".join(f"{count} {REASONS[reason]}" for reason, count in counts.items() if count))
    for name in FILES:
        say(f"{files[0].rstrip('/')}/{name}")
