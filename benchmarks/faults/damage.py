"""Damage to any file of any stage's folder, and kills, round by round: does the next run give the same tables?

    python -m benchmarks.faults.damage [--rounds 60] [--seed 0] [--train] [--json FILE]

A small pipeline in one process (a BEIR folder, BM25 and dense indexes, searches, scorecards; crops as queries, parsed,
filtered, mined) is run once. Each round then strikes up to three places: a bit is flipped, a file is cut, emptied, deleted,
touched, replaced by garbage, by a folder or by a link to nothing, two files change places, a folder is deleted or replaced
by a file, or another program leaves its own files beside ours. The verbs that look at results must come to an end beside
it; in half of the rounds a run is killed at some moment; and then a run has to end with the tables of before. ``--train``
adds a training and the index of what it gives.

Prints rounds, damages by kind and how each round ended: `same` (nothing had to be made again), `mended` (all tables are as
before), `one line` (an error for a person), `different` or `traceback`, of which there must be none: then it exits 1. A
round that ended otherwise than `same` or `mended` is printed with its damages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark
from dagr_ray.cli import inspect
from dagr_ray.core.artifact import Damaged
from dagr_ray.core.build import materialize, plan
from dagr_ray.core.config import ConfigError, digest
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Stage, StageFailed, walk
from dagr_ray.engines.crop import CropEngine
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes.augmentation import augment
from dagr_ray.recipes.evaluation import judge
from dagr_ray.report import bills
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.stages.take import Take
from dagr_ray.stages.train import Train
from dagr_ray.strategies.crop import Crop

HERE = Pool(workers=0, shard_rows=16)
PLACEMENT = Placement(light=HERE, generate=HERE, retrieve=HERE, train=Pool(workers=0))
GARBAGE = [
    b"[1]", b"{}", b"[" * 5000, b"null", b"\x00" * 64, b"not json", b'{"shard": -1, "tables": [], "files": 7}', b'"text"',
    b'{"shards": [{"start": 1e999, "stop": NaN}], "tables": {"queries": {"parts": []}}}', "{}".encode("utf-16"),
    b'{"trials": 1, "tables": {}, "inputs": {"self": "../.."}, "counts": {"in": -5}, "cost": {"wall_s": -Infinity}}',
]  # fmt: skip
STRANGERS = ("{0}~", ".#{0}", ".{0}.Xy12", "{0} (1)", "{1} (1){2}", "{1}.conflict{2}", "{0}.part", "{0}.orig")
OTHERS = (".DS_Store", "Thumbs.db", ".nfs000000000000a1b2", "desktop.ini", "._receipts", "lost+found/x")


def write_set(folder: Path, passages: int = 64) -> Path:
    """A BEIR folder of short passages with a judged query for each third."""
    (folder / "qrels").mkdir(parents=True)
    words = "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh oasis pond reef".split()
    drawn = random.Random(1)
    rows, asked, judged = [], [], []
    for i in range(passages):
        text = " ".join(" ".join(drawn.choices(words, k=drawn.randint(6, 12))).capitalize() + "." for _ in range(3))
        rows.append({"_id": f"d{i}", "title": "", "text": text})
        if i % 3 == 0:
            asked.append({"_id": f"q{i}", "text": " ".join(text.split()[2:9])})
            judged.append(f"q{i}\td{i}\t1")
    for name, lines in (("corpus", rows), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return folder


def asked(data: Path, train: bool) -> list[Stage]:
    """The stages at the end of the pipeline."""
    corpus, dense = Beir(path=str(data)), Dense(encoder=Encoder(model=str(minilm()), max_length=64, layers=2))
    selected, mined = augment(
        Sample(corpus=corpus, n=48), corpus, Crop(), CropEngine(), exemplars=None, samples=1, max_rank=50
    )
    taken = Take(mined=mined, n=24)
    made: list[Stage] = [judge({"set": corpus}, dense), judge({"set": corpus}, BM25()), taken]
    if train:
        trained = Train(
            examples=taken, queries=selected, corpus=corpus, base=dense.encoder, batch_size=8, max_length=64
        )
        made.append(judge({"set": corpus}, dense, trained=trained))
    return made


# -- what is done to the folders ------------------------------------------------------------------------------------------


class Vandal:
    """Strikes files below a runs folder."""

    def __init__(self, runs: Path, rng: random.Random) -> None:
        self.runs, self.rng = runs, rng

    def strike(self) -> str | None:
        """One damage; what was done and where, or None where there was nothing to do it to."""
        kind = self.rng.choice(KINDS)
        folders = sorted(path for path in self.runs.iterdir() if path.is_dir())
        if not folders:
            return None
        home = self.rng.choice(folders)
        where = getattr(self, f"_{kind}")(home)
        return None if where is None else f"{kind}: {where.relative_to(self.runs)}"

    def _file(self, home: Path) -> Path | None:
        """Any file; as often one of a receipt's or a manifest's as one of a table's."""
        groups: dict[str, list[Path]] = {}
        for path in sorted(home.rglob("*")):
            if path.is_file() and not path.is_symlink():
                groups.setdefault(path.relative_to(home).parts[0], []).append(path)
        return self.rng.choice(groups[self.rng.choice(sorted(groups))]) if groups else None

    def _changed(self, home: Path, change: Callable[[bytes], bytes]) -> Path | None:
        path = self._file(home)
        if path is not None:
            data = change(path.read_bytes())
            # as a disk does it (in place), or as another program does (a new file)
            if self.rng.random() < 0.5:
                path.unlink()
            path.write_bytes(data)
        return path

    def _flip(self, home: Path) -> Path | None:
        def flip(data: bytes) -> bytes:
            if not data:
                return data
            place = self.rng.randrange(len(data))
            return data[:place] + bytes([data[place] ^ (1 << self.rng.randrange(8))]) + data[place + 1 :]

        return self._changed(home, flip)

    def _cut(self, home: Path) -> Path | None:
        return self._changed(home, lambda data: data[: self.rng.randrange(len(data) + 1)])

    def _empty(self, home: Path) -> Path | None:
        return self._changed(home, lambda data: b"")

    def _zeros(self, home: Path) -> Path | None:
        """What some file systems leave of a file after a power cut."""
        return self._changed(home, lambda data: bytes(len(data)))

    def _garbage(self, home: Path) -> Path | None:
        return self._changed(home, lambda data: self.rng.choice(GARBAGE))

    def _delete(self, home: Path) -> Path | None:
        path = self._file(home)
        if path is not None:
            path.unlink()
        return path

    def _touch(self, home: Path) -> Path | None:
        path = self._file(home)
        if path is not None:
            os.utime(path, (self.rng.uniform(0, 2e9),) * 2)
        return path

    def _swap(self, home: Path) -> Path | None:
        other = self.rng.choice([home, *(path for path in self.runs.iterdir() if path.is_dir())])
        one, two = self._file(home), self._file(other)
        if one is None or two is None or one == two:
            return None
        aside = one.with_name(one.name + ".swapping")
        one.rename(aside)
        two.rename(one)
        aside.rename(two)
        return one

    def _folder_for_file(self, home: Path) -> Path | None:
        path = self._file(home)
        if path is not None:
            path.unlink()
            (path / "inner").mkdir(parents=True)
        return path

    def _link_to_nothing(self, home: Path) -> Path | None:
        path = self._file(home)
        if path is not None:
            path.unlink()
            path.symlink_to("nowhere")
        return path

    def _folder_gone(self, home: Path) -> Path | None:
        inner = [path for path in sorted(home.iterdir()) if path.is_dir()]
        chosen = self.rng.choice([*inner, home])
        shutil.rmtree(chosen)
        return chosen

    def _file_for_folder(self, home: Path) -> Path | None:
        inner = [path for path in sorted(home.iterdir()) if path.is_dir()]
        chosen = self.rng.choice([*inner, home])
        shutil.rmtree(chosen)
        chosen.write_bytes(b"x")
        return chosen

    def _stranger(self, home: Path) -> Path | None:
        """A copy under another program's name, with the same or other content, or a file of its own."""
        path = self._file(home)
        if path is None:
            return None
        if self.rng.random() < 0.3:
            path = path.with_name(self.rng.choice(OTHERS).split("/")[0])
            path.write_bytes(self.rng.randbytes(60))
            return path
        name = self.rng.choice(STRANGERS).format(path.name, path.stem, path.suffix)
        data = path.read_bytes()
        beside = path.with_name(name)
        beside.write_bytes(self.rng.choice([data, data[: len(data) // 2], b"", data.replace(b"1", b"2")]))
        return beside


KINDS = [name[1:] for name in vars(Vandal) if name[0] == "_" and name[1] != "_" and name not in ("_file", "_changed")]


# -- rounds ---------------------------------------------------------------------------------------------------------------


def tables(stages: list[Stage], runs: str) -> dict[str, str]:
    """A hash of every row of every table below some stages."""
    found = {}
    for stage in walk(*stages):
        folder = stage.folder(runs)
        for name in folder.table_names():
            found[f"{folder.name}/{name}"] = digest(folder.read(name).to_pylist())
    return found


def run(stages: list[Stage], runs: str) -> dict[str, str]:
    """Builds what is missing, as a command does: the tables at the end, then all of them after ``check --deep``."""
    made = [materialize(stage, runs, PLACEMENT) for stage in stages]
    found = {f"{each.name}/{name}": digest(each.read(name).to_pylist()) for each in made for name in each.table_names()}
    # what nothing reads any more may stay damaged until somebody looks
    list(plan(stages, runs, deep=True, repair=True))
    for stage in stages:
        materialize(stage, runs, PLACEMENT)
    return {f"at once {name}": value for name, value in found.items()} | tables(stages, runs)


def look(stages: list[Stage], runs: str, rng: random.Random) -> None:
    """The verbs that look at a runs folder. Raises what they do not expect."""
    args = argparse.Namespace(runs=runs, json=False, table=None, rows=3, folder=None)
    names = sorted(path.name for path in Path(runs).iterdir())
    with contextlib.redirect_stdout(io.StringIO()):
        for verb in (inspect.ls, inspect.bill, inspect.show):
            args.folder = rng.choice(names) if verb is inspect.show else None
            with contextlib.suppress(ConfigError):
                verb(args)
        for name in rng.sample(names, min(2, len(names))):
            with contextlib.suppress(ConfigError, Damaged):
                bills.text(bills.stage(runs, name))
    list(plan(stages, runs, deep=rng.random() < 0.5, repair=False))


def forked(work: Callable[[], Any], kill_after_s: float | None = None) -> tuple[str, Any]:
    """(how it ended, its value or text) of work in a process of its own; killed, where a time is given."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            told = ("ended", work())
        except (ConfigError, StageFailed, Damaged) as error:
            told = ("one line", f"{type(error).__name__}: {error}")
        except BaseException:
            told = ("traceback", traceback.format_exc())
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(told, stream)
        os._exit(0)
    os.close(writing)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    os.waitpid(child, 0)
    return pickle.loads(data) if data else ("killed", None)


def measure(rounds: int, seed: int, train: bool) -> dict[str, Any]:
    """All rounds."""
    began, rng = time.time(), random.Random(seed)
    struck, ends, told = Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="dagr-damage-") as home:
        os.environ["DAGR_SCRATCH"] = f"{home}/scratch"
        runs = f"{home}/runs"
        stages = asked(write_set(Path(home, "set")), train)
        end, first = forked(lambda: (run(stages, runs), sorted(sys.modules)))
        assert end == "ended", first
        calm, modules = first
        _import_once(modules)
        for number in range(rounds):
            vandal = Vandal(Path(runs), rng)
            done = [what for _ in range(rng.choice((1, 1, 2, 3))) if (what := vandal.strike())]
            struck.update(what.partition(":")[0] for what in done)
            state = _state(runs)
            looked = forked(lambda: look(stages, runs, rng))
            if looked[0] == "traceback":
                ends["traceback"] += 1
                told.append({"round": number, "end": "traceback while looking", "damages": done, "text": looked[1]})
            if rng.random() < 0.5:
                struck["kill"] += forked(lambda: run(stages, runs), rng.uniform(0, 1.2))[0] == "killed"
            end, found = forked(lambda: run(stages, runs))
            if end == "ended":
                end = ("same" if _state(runs) == state else "mended") if found == calm else "different"
                found = None if found == calm else {k: v for k, v in found.items() if calm.get(k) != v}
            ends[end] += 1
            if end not in ("same", "mended"):
                told.append({"round": number, "end": end, "damages": done, "text": found})
                print(f"round {number}, {end}: {done}\n{found}", file=sys.stderr, flush=True)
                shutil.rmtree(runs)
                forked(lambda: run(stages, runs))
    return {
        "rounds": rounds, "seconds": round(time.time() - began, 1), "damages": dict(sorted(struck.items())),
        "ends": dict(ends), "told": told,
    }  # fmt: skip


def _import_once(modules: Sequence[str]) -> None:
    """Imports here what a run imports, so that no fork does it again; all but Java, which no fork could go on with."""
    for name in modules:
        if name.partition(".")[0] not in ("jnius", "jnius_config", "pyserini"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _state(runs: str) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_ino) for path in Path(runs).glob("*/receipts/*.json"))


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"{found['rounds']} rounds in {found['seconds']:.0f} s.", "", "| damage | times |", "|---|---:|"]
    lines += [f"| {kind.replace('_', ' ')} | {times} |" for kind, times in found["damages"].items()]
    lines += ["", "| a round ended | times |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {end} | {times} |" for end, times in sorted(found["ends"].items()))])


def main() -> int:
    """Runs the rounds, prints and writes the table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--rounds", type=int, default=int(os.environ.get("DAGR_DAMAGE_ROUNDS", "60")))
    bench.add("--seed", type=int, default=0)
    bench.add("--train", action="store_true")
    args = bench.parse()
    import logging

    import torch

    torch.set_num_threads(1)
    logging.getLogger("dagr").setLevel(logging.CRITICAL)
    found = measure(args.rounds, args.seed, args.train)
    bench.say(table(found))
    for each in found["told"]:
        print(f"\nround {each['round']}: {each['end']}: {each['damages']}\n{each['text']}")
        bench.fail(f"round {each['round']} ended with: {each['end']}")
    return bench.finish(found)


if __name__ == "__main__":
    sys.exit(main())
