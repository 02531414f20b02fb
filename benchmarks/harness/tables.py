"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]], left: Iterable[int] = (0,)) -> list[str]:
    """The lines of a table: the columns numbered in ``left`` are text, all others are figures, on the right."""
    text = {number % len(head) for number in left}
    rule = "".join("---|" if number in text else "---:|" for number in range(len(head)))
    lines = [f"| {' | '.join(head)} |", f"|{rule}"]
    for row in rows:
        cells = [str(cell) for cell in row]
        if len(cells) != len(head):
            raise ValueError(f"a row of {len(cells)} cells in a table of {len(head)} columns: {cells}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
