"""Passages without people's data."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.filters.pii import Pii


class Mask(Stage):
    """A corpus in which the data of people that ``pii`` finds are masked, in titles and texts; ids and order stay.

    ``masked`` has a row for each passage that was changed: what of, not the data. Ask for queries and search in this
    corpus, and no model sees them. Other tables of ``corpus`` (queries, judgements) are not taken over.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "masked")
    corpus: Stage
    pii: Pii = Pii(mask=True)

    def size(self, inputs: Inputs) -> int:
        return inputs["corpus"].count("corpus")

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            rows = inputs["corpus"].slice("corpus", start, stop)
            columns = {name: tables.texts(rows[name]) for name in ("title", "text")}
            changed: dict[str, list[str]] = {"id": [], "by": [], "detail": []}
            for row, doc_id in enumerate(tables.texts(rows["doc_id"])):
                for name, column in columns.items():
                    done = self.pii.masked(column[row] or "")
                    if done is not None:
                        column[row] = done[0]
                        for into, value in zip(changed.values(), (doc_id, "pii", f"{name}: {done[1]}"), strict=True):
                            into.append(value)
            made = {
                "corpus": tables.columns("corpus", rows.num_rows, doc_id=rows["doc_id"], **columns),
                "masked": tables.columns("masked", len(changed["id"]), **changed),
            }
            counts = {"in": rows.num_rows, "out": rows.num_rows, "masked": len(changed["id"])}
            return Output(made, counts=counts)

        return run
