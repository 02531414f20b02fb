"""Sources in TREC's formats: runs of other systems, and judgements."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.paths import FileOrFolder, last_name, word_of
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.formats import beir, trec

log = logging.getLogger("dagr")


class _TrecFile(Stage):
    """A file in a TREC format, identified by its bytes."""

    abstract: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("rejected",)
    path: FileOrFolder

    def label(self) -> str:
        return word_of(last_name(self.path).removesuffix(".gz"))

    def identity(self) -> dict[str, Any]:
        """The content of the file, whatever its path."""
        return super().identity() | {"path": trec.content(self.path)}

    def _output(self, name: str, file: trec.TrecFile) -> Output:
        for line in beir.summarise_problems(file.problems):
            log.warning("%s", line)
        rejected = tables.Rejected()
        for problem in file.problems:
            rejected.add(f"{problem.file}:{problem.line}", self.type, problem.reason, problem.detail)
        reasons = Counter(f"{self.type}/{problem.reason}" for problem in file.problems)
        counts = {"in": file.lines, "out": file.table.num_rows, "rejected": dict(reasons)}
        return Output({name: file.table, "rejected": rejected.table()}, counts=counts)


class TrecRun(_TrecFile):
    """Another system's run, as ``candidates``: ``path`` (or a URI) of a TREC run file, plain or gzipped.

    ``Evaluate`` accepts it as a search. Bad lines are omitted, counted and listed in ``rejected`` with file and line; over
    1 % of them raises ConfigError. Order and ties are trec_eval's: see ``dagr_ray.formats.trec``.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "search"
    outputs: ClassVar[tuple[str, ...]] = ("candidates", "rejected")

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        return lambda start, stop: self._output("candidates", trec.read_run(self.path))


class TrecQrels(_TrecFile):
    """Judgements in a TREC qrels file, as ``qrels.<split>``, for ``data`` of an ``Evaluate``. Bad lines as in ``TrecRun``."""

    abstract: ClassVar[bool] = False
    split: Annotated[str, Field(min_length=1)] = "test"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        return lambda start, stop: self._output(f"qrels.{self.split}", trec.read_qrels(self.path))
