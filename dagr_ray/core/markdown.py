"""Escapes texts from outside for Markdown: model cards, reports, notes of runs."""

from __future__ import annotations

import re

from dagr_ray.core.terminal import shown

# An underscore inside a word has no meaning in Markdown.
_MEANS = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
_FIRST = re.compile(r"^(#|=|[-+](?=\s|[-+]|$)|\d+(?=[.)]))")


def markdown(text: object) -> str:
    r"""A text as one line of Markdown that shows it literally: no link, image, tag, emphasis, heading, list or cell.

    >>> print(markdown("[a](javascript:b) <img> a_b _c_ | `d`"), markdown("# e\n1. f"), markdown("2. g"))
    \[a\](javascript:b) &lt;img&gt; a_b \_c\_ \| \`d\` \# e 1. f 2\. g
    """
    line = _MEANS.sub(r"\\\g<0>", " ".join(shown(text).split()))
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;").replace(">", "&gt;")
    return _FIRST.sub(lambda match: f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}", line)


def code(text: object) -> str:
    """A text as one line of Markdown code, with a fence longer than any run of backticks in it.

    >>> code("models/e5"), code("a`b")
    ('`models/e5`', '`` a`b ``')
    """
    line = " ".join(shown(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if "`" not in line else f"{fence} {line} {fence}"
