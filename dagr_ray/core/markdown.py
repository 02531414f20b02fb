"""Texts of others inside Markdown: model cards, reports, notes of runs."""

from __future__ import annotations

import re

from dagr_ray.core.terminal import shown

# An underscore inside a word is none of Markdown's.
_MEANS = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
_FIRST = re.compile(r"^(#|=|[-+](?=\s|[-+]|$)|\d+(?=[.)]))")


def markdown(text: object) -> str:
    r"""A text on one line that Markdown shows as it is: no link, image, tag, emphasis, heading, list or cell of its own.

    >>> print(markdown("[a](javascript:b) <img> a_b _c_ | `d`"), markdown("# e\n1. f"), markdown("2. g"))
    \[a\](javascript:b) &lt;img&gt; a_b \_c\_ \| \`d\` \# e 1. f 2\. g
    """
    said = _MEANS.sub(r"\\\g<0>", " ".join(shown(text).split()))
    said = re.sub(r"&(?=#?\w+;)", "&amp;", said).replace("<", "&lt;").replace(">", "&gt;")
    return _FIRST.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", said)


def code(text: object) -> str:
    """A text on one line as Markdown's code, whatever it holds.

    >>> code("models/e5"), code("a`b")
    ('`models/e5`', '`` a`b ``')
    """
    said = " ".join(shown(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", said)), default=0))
    return f"{fence}{said}{fence}" if "`" not in said else f"{fence} {said} {fence}"
