"""The table of a study for a terminal and as Markdown."""

from __future__ import annotations

from dagr_ray.core.artifact import Json
from dagr_ray.core.markdown import code, markdown
from dagr_ray.report.verdict import dollars, duration, is_gain, is_loss, p_text, signed


def terminal_table(summary: Json) -> str:
    """One line a trial, then the verdict. A star marks gains and losses that stand after correction."""
    measure, sets = summary["measure"], [*summary["sets"], *summary["averages"]]
    head = ["base", "generator", "rows"]
    for data in sets:
        head += [f"{data['name']} {measure}", "over frozen [95 % CI]"]
    head += ["tokens", "time", "cost"]
    lines = []
    for trial in summary["trials"]:
        cells = [trial["base"], trial["label"] or "-", f"{trial['used']:,}" if trial["used"] else "0"]
        for data in sets:
            cells += _quality(trial, data["name"], measure)
        lines.append([*cells, *_spent(trial)])
    left = {0, 1}
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    shown = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *lines]
    ]
    shown.insert(1, "  ".join("-" * w for w in widths))
    words = summary["verdict"]
    notes = [f"note: {warning}" for warning in [*summary["warnings"], *_read(summary)]]
    return "\n".join(
        [*(line.rstrip() for line in shown), "", words["headline"], *(f"* {s}" for s in words["sentences"]), *notes]
    )


def _quality(trial: Json, name: str, measure: str) -> list[str]:
    score = trial["scores"].get(name, {}).get(measure)
    if score is None:
        return [trial["state"], ""]
    if "delta" not in score:
        return [f"{score['mean']:.3f}", ""]
    star = "*" if is_gain(score) or is_loss(score) else " "
    return [
        f"{score['mean']:.3f}",
        f"{signed(score['delta'])} [{signed(score['delta_low'])}, {signed(score['delta_high'])}]{star}",
    ]


def _spent(trial: Json) -> list[str]:
    cost = trial["cost"]
    if not cost:
        return ["", "", ""]
    return [f"{cost['prompt_tokens'] + cost['completion_tokens']:,}", duration(cost["seconds"]), dollars(cost["price"])]


def markdown_table(summary: Json) -> str:
    """A table for each data set with all measures, and the verdict as a list."""
    words = summary["verdict"]
    lines = [f"**{markdown(words['headline'])}**", "", *(f"- {markdown(sentence)}" for sentence in words["sentences"])]
    for data in [*summary["sets"], *summary["averages"]]:
        measures = data["measures"]
        first = summary["measure"]
        others = [m for m in measures if m != first]
        lines += ["", f"{_titled(data)}:", ""]
        head = ["base", "generator", "rows", f"{first} [95 % CI]", "over frozen [95 % CI]", "p (Holm)", *others, "cost"]
        lines += ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] * 2 + ["---:"] * (len(head) - 2)) + "|"]
        for trial in summary["trials"]:
            scores = trial["scores"].get(data["name"])
            cells = [markdown(trial["base"]), markdown(trial["label"] or "–"), f"{trial['used']:,}"]
            if scores is None:
                cells += [trial["state"], *[""] * (len(head) - 4)]
            else:
                s = scores[first]
                cells.append(f"{s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]")
                if "delta" in s:
                    cells.append(f"{signed(s['delta'])} [{signed(s['delta_low'])}, {signed(s['delta_high'])}]")
                    cells.append(p_text(s["p_holm"]).removeprefix("p = ").removeprefix("p "))
                else:
                    cells += ["", ""]
                cells += [f"{scores[m]['mean']:.3f}" for m in others]
                cells.append(dollars(trial["cost"]["price"]) if trial["cost"] else "")
            lines.append("| " + " | ".join(cells) + " |")
    if any(len(trial["seeds"]) > 1 for trial in summary["trials"]):
        lines += ["", *_seeds(summary)]
    lines += [f"\nNote: {markdown(warning)}" for warning in [*summary["warnings"], *_read(summary)]]
    return "\n".join(lines)


def _read(summary: Json) -> list[str]:
    """How BM25 reads what is not English."""
    return [
        f"BM25 reads {each['data']} as {each['read_as']} (language {each['language']})"
        for each in summary["lexical"]
        if each["language"] != "en"
    ]


def _titled(data: Json) -> str:
    if "role" not in data:
        return f"{data['name'][0].upper()}{data['name'][1:]} ({', '.join(map(markdown, data['sets']))})"
    where = {"in": "in distribution", "out": "out of distribution"}[data["role"]]
    return f"{code(data['name'])}, {where}, {data['queries']:,} queries"


def _seeds(summary: Json) -> list[str]:
    """A Markdown table of the arms with several seeds: what varies between seeds, and what between queries."""
    measure = summary["measure"]
    head = f"| data set | base | generator | rows | {measure} by seed | SD of seeds | SE over seeds | SE over queries |"
    lines = [head, "|---|---|---|---:|---|---:|---:|---:|"]
    for line in seed_lines(summary):
        means = ", ".join(f"{mean:.3f}" for mean in line["means"])
        errors = " | ".join(f"{line[key]:.4f}" for key in ("seed_sd", "seed_se", "query_se"))
        names = " | ".join(markdown(line[key]) for key in ("set", "base", "label"))
        lines.append(f"| {names} | {line['used']:,} | {means} | {errors} |")
    return lines


def seed_lines(summary: Json) -> list[Json]:
    """For each arm of several seeds and each data set: the seeds' means and their standard deviation, and two standard
    errors of the arm's gain over its frozen base: that of seeds and that of queries."""
    found = []
    for data in summary["sets"]:
        for trial in summary["trials"]:
            score = trial["scores"].get(data["name"], {}).get(summary["measure"], {})
            if "seed_sd" not in score:
                continue
            key = data.get("key", data["name"])
            every = [each["means"].get(key, {}).get(summary["measure"]) for each in trial["seeds"]]
            means = [mean for mean in every if mean is not None]
            found.append(
                {
                    "set": data["name"],
                    "base": trial["base"],
                    "label": trial["label"],
                    "used": trial["used"],
                    "means": means,
                    "seed_sd": score["seed_sd"],
                    "seed_se": score["seed_sd"] / len(means) ** 0.5,
                    "query_se": score.get("query_se", 0.0),
                }
            )
    return found
