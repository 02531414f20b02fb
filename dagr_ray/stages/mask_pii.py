"""Masks personal data in passages."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.filters.pii import Pii


class Mask(Stage):
    """A corpus in which personal data found by ``pii`` are masked, in titles and texts; ids and order stay.

    ``masked`` has a row for each changed passage: the kind of data, not the data. Generate and search in this corpus, and
    no model sees them. Other tables of ``corpus`` (queries, judgements) are not copied.
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
                    masked = self.pii.masked(column[row] or "")
                    if masked is not None:
                        column[row] = masked[0]
                        for column_values, value in zip(
                            changed.values(), (doc_id, "pii", f"{name}: {masked[1]}"), strict=True
                        ):
                            column_values.append(value)
            output = {
                "corpus": tables.columns("corpus", rows.num_rows, doc_id=rows["doc_id"], **columns),
                "masked": tables.columns("masked", len(changed["id"]), **changed),
            }
            counts = {"in": rows.num_rows, "out": rows.num_rows, "masked": len(changed["id"])}
            return Output(output, counts=counts)

        return run
