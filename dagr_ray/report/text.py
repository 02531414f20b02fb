"""Formats the table of a study for the terminal and as Markdown."""

from __future__ import annotations

from dagr_ray.core.artifact import Json
from dagr_ray.core.markdown import code, markdown
from dagr_ray.report.verdict import best_arm, dollars, duration, is_gain, is_loss, p_text, signed


def terminal_table(summary: Json) -> str:
    """One line for each trial, then the verdict. A star marks gains and losses that are significant after correction."""
    measure, sets = summary["measure"], [*summary["sets"], *summary["averages"]]
    head = ["base", "generator", "rows"]
    for data in sets:
        head += [f"{data['name']} {measure}", f"over frozen [{summary['interval']}]"]
    head += ["tokens", "time", "cost"]
    lines = []
    for trial in summary["trials"]:
        cells = [trial["base"], trial["label"] or "-", f"{trial['used']:,}" if trial["used"] else "0"]
        for data in sets:
            cells += _quality(trial, data["name"], measure)
        lines.append([*cells, *_costs(trial)])
    left_aligned = {0, 1}
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    table = [
        "  ".join(
            cell.ljust(w) if i in left_aligned else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *lines]
    ]
    table.insert(1, "  ".join("-" * w for w in widths))
    verdict = summary["verdict"]
    notes = [f"note: {warning}" for warning in [*summary["warnings"], *_analyzer_notes(summary)]]
    return "\n".join(
        [
            *(line.rstrip() for line in table),
            "",
            verdict["headline"],
            *(f"* {s}" for s in verdict["sentences"]),
            *notes,
            *_model_lines(summary),
        ]
    )


def _model_lines(summary: Json) -> list[str]:
    """The best trained model for each base, on the first data set, and how to load it."""
    lines = []
    for base in dict.fromkeys(trial["base"] for trial in summary["trials"]):
        arms = {t["trial"]: t for t in summary["trials"] if t["base"] == base and t.get("model")}
        for data in summary["sets"][:1]:
            scores = {n: t["scores"].get(data["name"], {}).get(summary["measure"], {}) for n, t in arms.items()}
            scores = {name: score for name, score in scores.items() if "delta" in score}
            if scores:
                best = arms[best_arm(scores)]
                lines.append(
                    f"model, {base} with {best['used']:,} {best['label']}: SentenceTransformer({best['model']!r})"
                )
    return lines


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


def _costs(trial: Json) -> list[str]:
    cost = trial["cost"]
    if not cost:
        return ["", "", ""]
    return [f"{cost['prompt_tokens'] + cost['completion_tokens']:,}", duration(cost["seconds"]), dollars(cost["price"])]


def markdown_table(summary: Json) -> str:
    """A table for each data set with all measures, and the verdict as a list."""
    verdict = summary["verdict"]
    lines = [
        f"**{markdown(verdict['headline'])}**",
        "",
        *(f"- {markdown(sentence)}" for sentence in verdict["sentences"]),
    ]
    for data in [*summary["sets"], *summary["averages"]]:
        measures = data["measures"]
        first, ci = summary["measure"], summary["interval"]
        others = [m for m in measures if m != first]
        lines += ["", f"{_title(data)}:", ""]
        head = ["base", "generator", "rows", f"{first} [{ci}]", f"over frozen [{ci}]", "p (Holm)", *others, "cost"]
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
    lines += [f"\nNote: {markdown(warning)}" for warning in [*summary["warnings"], *_analyzer_notes(summary)]]
    return "\n".join(lines)


def _analyzer_notes(summary: Json) -> list[str]:
    """Notes on how BM25 analyses data that is not in English."""
    return [
        f"BM25 reads {line['data']} as {line['read_as']} (language {line['language']})"
        for line in summary["lexical"]
        if line["language"] != "en"
    ]


def _title(data: Json) -> str:
    if "role" not in data:
        return f"{data['name'][0].upper()}{data['name'][1:]} ({', '.join(map(markdown, data['sets']))})"
    role = {"in": "in distribution", "out": "out of distribution"}[data["role"]]
    return f"{code(data['name'])}, {role}, {data['queries']:,} queries"


def _seeds(summary: Json) -> list[str]:
    """A Markdown table of the arms with several seeds: the variation between seeds and between queries."""
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
    """For each data set and each arm with several seeds: the seeds' means and their standard deviation.

    Also two standard errors of the arm's gain over its frozen base: over seeds and over queries.
    """
    lines = []
    for data in summary["sets"]:
        for trial in summary["trials"]:
            score = trial["scores"].get(data["name"], {}).get(summary["measure"], {})
            if "seed_sd" not in score:
                continue
            key = data.get("key", data["name"])
            values = [seed["means"].get(key, {}).get(summary["measure"]) for seed in trial["seeds"]]
            means = [mean for mean in values if mean is not None]
            lines.append(
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
    return lines
