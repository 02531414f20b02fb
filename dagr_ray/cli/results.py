"""The verbs that show and export results: report, compare, export, annotate. Each returns an exit code, or None for 0."""

from __future__ import annotations

from pathlib import Path

from dagr_ray.cli.inspect import Args, find, folders
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.terminal import print_json, say


def report(args: Args) -> int | None:
    """``dagr report``."""
    from dagr_ray import report as reports

    if args.study:
        name = find(args.runs, args.study).name
    else:
        studies = [(changed, n) for n, changed in folders(args.runs) if n.startswith("study-")]
        if not studies:
            raise ConfigError(
                f"no study in {args.runs!r}; run `dagr study jobs/quickstart.py --runs {args.runs}` first"
            )
        # the newest study that can be read
        sound = [study for study in studies if Artifact(args.runs, study[1]).read_json("study.json") is not None]
        name = max(sound or studies)[1]
    summary = reports.summarise(args.runs, name)
    if args.json:
        print_json(summary)
    elif args.markdown:
        say(reports.markdown_table(summary))
    else:
        say(reports.terminal_table(summary))
        say(f"page: {reports.write_page(summary, args.runs, name)}")
    return None


def compare(args: Args) -> int | None:
    """``dagr compare``."""
    from dagr_ray.report import compare as comparing

    runs = comparing.load_runs(args.run, lambda name: find(args.runs, name))
    comparison = comparing.compare(comparing.load_judgements(args.data, args.split), runs, args.measure)
    if args.json:
        print_json(comparison)
    else:
        say(comparing.text(comparison))
    return None


def export(args: Args) -> int | None:
    """``dagr export``."""
    from dagr_ray.formats import export as exports

    folder = find(args.runs, args.folder)
    if folder.manifest is None:
        raise ConfigError(f"{folder.name} is not complete; run its job again to finish it")
    write = {
        "beir": exports.to_beir,
        "sentence-transformers": exports.to_sentence_transformers,
        "trec": exports.to_trec,
    }
    for name, lines in write[args.format](folder, args.runs, args.target).items():
        say(f"{Path(args.target) / name if args.format == 'beir' else name}: {lines:,} lines")
    return None


def annotate(args: Args) -> int | None:
    """``dagr annotate export`` and ``dagr annotate import``."""
    from dagr_ray.cli import annotate

    annotate.run(args, lambda name: find(args.runs, name))
    return None
