"""States the answers in words: did it help, how much is enough, what did it cost. "No" and "cannot tell" are answers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dagr_ray.core.artifact import Json
from dagr_ray.report.decision import ALPHA, WORTH
from dagr_ray.report.decision.outcomes import QUERIES, can_rule_out
from dagr_ray.report.decision.power import errors_seen
from dagr_ray.report.numbers import dollars, duration, p_text, signed

ROLES = {"in": "in distribution", "out": "out of distribution"}


def verdict(summary: Json) -> Json:
    """``headline``, ``sentences`` and ``answers`` (one for each data set and base) for a summary without them."""
    answers = [_answer(summary, s, base, arms) for s in summary["sets"] for base, arms in _arms(summary, s["name"])]
    sentences = [
        *(answer["sentence"] for answer in answers),
        *_average(summary),
        *_harm(summary),
        *_enough(summary, answers),
        *_generators(summary),
        *_bm25(summary),
        *_cost(summary),
    ]
    states = [seed["state"] for t in summary["trials"] for seed in t.get("seeds", [t])]
    unfinished = [state for state in states if state != "done"]
    if unfinished:
        sentences.append(f"{len(unfinished)} of {len(states)} trials have no result, so the answers are partial.")
    return {"headline": _headline(answers), "sentences": sentences, "answers": answers}


def _arms(summary: Json, name: str) -> list[tuple[str, list[Json]]]:
    """The tested arms of a data set by base, in the order of the study."""
    groups: dict[str, list[Json]] = {}
    for trial in summary["trials"]:
        if "delta" in trial["scores"].get(name, {}).get(summary["measure"], {}):
            groups.setdefault(trial["base"], []).append(trial)
    return list(groups.items())


def _compared(summary: Json, name: str) -> int:
    return sum(len(arms) for _, arms in _arms(summary, name))


def is_gain(score: Json) -> bool:
    """Whether the arm is better than the frozen base, by the interval and by the corrected test."""
    return bool(score["delta_low"] > 0 and score["p_holm"] < score.get("alpha", ALPHA))


def is_loss(score: Json) -> bool:
    return bool(score["delta_high"] < 0 and score["p_holm"] < score.get("alpha", ALPHA))


def rules_out(queries: int, score: Json, worth: float = WORTH) -> bool:
    """Whether the interval of a gain over this many judged queries can rule out larger gains (``can_rule_out``).

    If every score is 0, no gain could be observed.
    """
    if score["mean"] <= 0 and score["mean"] - score["delta"] <= 0:
        return False
    if can_rule_out(queries, 0, worth):
        return True
    changed = score["won"] + score["lost"] if "won" in score else queries
    return can_rule_out(queries, changed, worth) and score["delta_high"] > score["delta_low"]


def _answer(summary: Json, data: Json, base: str, arms: list[Json]) -> Json:
    measure, name, worth = summary["measure"], data["name"], summary["worth"]
    scores = {arm["trial"]: arm["scores"][name][measure] for arm in arms}
    gains = [arm for arm in arms if is_gain(scores[arm["trial"]])]
    losses = [arm for arm in arms if is_loss(scores[arm["trial"]])]
    chosen = best_arm(scores)
    best = next(arm for arm in arms if arm["trial"] == chosen)
    score = scores[chosen]
    training = _training_data(best)
    interval = f"{summary['interval']} {signed(score['delta_low'])} to {signed(score['delta_high'])}"
    change = f"{signed(score['delta'])}, {interval}"
    before = score["mean"] - score["delta"]
    result = f"{training} took {measure} from {before:.3f} to {score['mean']:.3f} ({change}"
    if gains:
        answer, why = "yes", f"{result}; {p_text(score['p_holm'])})"
        if len(arms) > 1:
            why += f"; {len(gains)} of {len(arms)} arms gained"
    elif len(losses) == len(arms):
        answer, why = "worse", f"every arm lost; the best, {result}; {p_text(score['p_holm'])})"
    elif score["delta_high"] < worth and rules_out(data["queries"], score, worth):
        answer, why = "no", f"of {len(arms)} arms the best, {result}): a gain of {worth:g} or more is ruled out"
    else:
        reason = _why_open(summary, data, score)
        answer, why = "cannot tell", f"of {len(arms)} arms the best, {result}; {p_text(score['p_holm'])}): {reason}"
    if losses and answer != "worse":
        why += f"; {len(losses)} of {len(arms)} arms lost"
    if "won" in score:
        why += f"; {score['won']:,} queries won, {score['lost']:,} lost, {score['same']:,} tied"
    many = len({t["base"] for t in summary["trials"] if t["kind"] == "augmented"}) > 1
    return {
        "set": name,
        "role": data["role"],
        "base": base if many else "",
        "answer": answer,
        "trial": best["trial"],
        "delta": score["delta"],
        **_visible(summary, data, score),
        "sentence": f"{name} ({ROLES[data['role']]}){f', {base}' if many else ''}: {ANSWERS[answer]}. {why[0].upper()}{why[1:]}.",
    }


def _visible(summary: Json, data: Json, score: Json) -> Json:
    """The smallest gain that a data set's queries show after correction for its arms, and how many ``worth`` needs."""
    arms = _compared(summary, data["name"])
    smallest = errors_seen(arms, summary["alpha"]) * score.get("se", 0.0)
    needed = math.ceil(data["queries"] * (smallest / summary["worth"]) ** 2)
    return {"smallest": smallest, "needed": needed, "arms": arms} if smallest else {}


def _why_open(summary: Json, data: Json, score: Json) -> str:
    """Why a gain is neither shown nor ruled out, and how many judged queries would show it."""
    queries, visible = data["queries"], _visible(summary, data, score)
    reason = _reason(queries, score, _compared(summary, data["name"]), summary["worth"])
    if not visible or queries < QUERIES:
        return reason
    arms = f"{visible['arms']} arm{'' if visible['arms'] == 1 else 's'}"
    return (
        f"{reason}; the smallest gain that {queries:,} judged queries show is {visible['smallest']:.3f} (80 % power, {arms}), "
        f"and {summary['worth']:g} needs about {visible['needed']:,}"
    )


def _reason(queries: int, score: Json, arms: int, worth: float) -> str:
    if score["mean"] <= 0 and score["mean"] - score["delta"] <= 0:
        return "no retrieved passage is judged relevant"
    if queries < QUERIES:
        return f"{queries:,} judged quer{'y is' if queries == 1 else 'ies are'} too few to tell"
    if score["delta_high"] < worth:
        return "too few queries changed to tell"
    return "the interval includes 0" if score["delta_low"] <= 0 else f"not significant after correction for {arms} arms"


def best_arm(scores: dict[str, Json]) -> str:
    """The arm that the answer is about: of the arms of a base, the best arm with a significant gain, or else the best arm."""
    gains = [trial for trial in scores if is_gain(scores[trial])]
    return max(gains or scores, key=lambda trial: scores[trial]["mean"])


def _training_data(arm: Json) -> str:
    """The number and kind of rows that an arm was trained on, in words."""
    seeds = sum(bool(seed.get("means")) for seed in arm.get("seeds", ()))
    return f"{arm['used']:,} {arm['label']} {arm['trained_on']}" + (f" ({seeds} seeds)" if seeds > 1 else "")


def _harm(summary: Json) -> list[str]:
    """Every arm whose mean is more than ``worth`` below the mean of its frozen base, significant or not."""
    names = [data["name"] for data in summary["sets"]]
    rows = [
        (trial, name, score)
        for name in names
        for trial in summary["trials"]
        if (score := trial["scores"].get(name, {}).get(summary["measure"], {})).get("delta", 0) < -summary["worth"]
    ]
    if not rows:
        return []
    rows.sort(key=lambda row: row[2]["delta"])
    shown = [
        f"{_training_data(trial)}, {trial['base']}, on {name} ({signed(score['delta'])}"
        f"{'' if is_loss(score) else ', not significant'})"
        for trial, name, score in rows[:5]
    ]
    more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
    return [
        f"Worse than the frozen base by more than {summary['worth']:g} {summary['measure']}: {'; '.join(shown)}{more}."
    ]


def _average(summary: Json) -> list[str]:
    """The best arm of each base by the mean over all data sets."""
    sentences = []
    for average in summary["averages"]:
        for base, arms in _arms(summary, average["name"]):
            scores = {arm["trial"]: arm["scores"][average["name"]][summary["measure"]] for arm in arms}
            chosen = best_arm(scores)
            best, score = next(arm for arm in arms if arm["trial"] == chosen), scores[chosen]
            sentences.append(
                f"{average['name'][0].upper()}{average['name'][1:]}, {base}: at best {score['mean']:.3f} with "
                f"{_training_data(best)}, {signed(score['delta'])} over frozen ({summary['interval']} "
                f"{signed(score['delta_low'])} to {signed(score['delta_high'])}; {p_text(score['p_holm'])})."
            )
    return sentences


ANSWERS = {"yes": "yes, it helped", "no": "no", "worse": "no, it made things worse", "cannot tell": "cannot tell"}


def _headline(answers: list[Json]) -> str:
    if not answers:
        return "No answer yet: no trained retriever can be compared with its frozen base."
    parts = []
    for role, role_name in ROLES.items():
        role_answers = [answer for answer in answers if answer["role"] == role]
        if not role_answers:
            continue
        words = {"yes": "yes", "no": "no", "worse": "it got worse", "cannot tell": "cannot tell"}
        several = len({a["set"] for a in role_answers}) > 1
        by_word: dict[str, list[str]] = {}
        for a in role_answers:
            whose = " on ".join(x for x in (a["base"], a["set"] if several else "") if x)
            by_word.setdefault(words[a["answer"]], []).append(whose)
        listed = [word + (f" for {_and(w for w in whose)}" if any(whose) else "") for word, whose in by_word.items()]
        if len(by_word) == 1 and not several:
            listed = [next(iter(by_word))]
        parts.append(f"{role_name[0].upper()}{role_name[1:]}: {', '.join(listed)}.")
    return "Did augmentation help? " + " ".join(parts)


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _enough(summary: Json, answers: list[Json]) -> list[str]:
    """How much is enough, for each curve with a gain on the in-distribution data."""
    sentences = []
    several = [curve for curve in _in_curves(summary) if len(curve["points"]) > 2]
    for curve in several:
        if not any("p_holm" in p and is_gain(p) for p in curve["points"]):
            continue
        who = _who(summary, curve)
        queries = next(data["queries"] for data in summary["sets"] if data["name"] == curve["set"])
        if queries < QUERIES:
            sentences.append(f"How much is enough, {who}: cannot tell; {queries:,} judged queries are too few.")
            continue
        steps = [s for s in curve["steps"] if s["per_100_rows"] is not None]
        rates = ", ".join(f"{signed(s['per_100_rows'])} from {s['from']:,} to {s['to']:,}" for s in steps)
        rate = f" Gain for each 100 more queries: {rates}." if len(steps) > 1 else ""
        sentences.append(f"How much is enough, {who}: {_shown_enough(curve, summary['worth'])}.{rate}")
    if not sentences and answers and several:
        sentences.append("How much is enough: no volume beats the frozen base significantly in distribution.")
    return sentences


def _shown_enough(curve: Json, worth: float) -> str:
    """The smallest volume that is shown to be enough, or why none is."""
    rest, used = curve["rest"], [point["used"] for point in curve["points"]]
    change = f"{signed(rest['mean'])}, {signed(rest['low'])} to {signed(rest['high'])}"
    if curve["enough"] is not None:
        volume = f"{curve['enough']:,} queries" if curve["enough"] else "no queries are needed"
        return f"{volume}; it is shown that no larger volume tried adds {worth:g} or more (the most is {change})"
    if rest["outcome"] == "better":
        return f"more than was tried may help; {used[-1]:,} are better than {used[-2]:,} ({change})"
    return (
        f"cannot tell; {used[-1]:,} may add {worth:g} or more to {used[-2]:,} ({change}). {rest['queries']:,} judged queries show "
        f"a difference of {rest['smallest']:.3f} or more between the two, and {worth:g} needs about {rest['needed']:,}"
    )


def _in_curves(summary: Json) -> list[Json]:
    inside = {s["name"] for s in summary["sets"] if s["role"] == "in"}
    return [curve for curve in summary["curves"] if curve["set"] in inside]


def _who(summary: Json, curve: Json) -> str:
    many = len({c["base"] for c in summary["curves"]}) > 1
    return f"{curve['label']} for {curve['base']}" if many else curve["label"]


def _generators(summary: Json) -> list[str]:
    """The best mean of each generator, side by side. They are not tested against each other."""
    sentences = []
    for base in dict.fromkeys(c["base"] for c in _in_curves(summary)):
        ends = [(c["points"][-1], c) for c in _in_curves(summary) if c["base"] == base]
        if len({c["generator"] for _, c in ends}) < 2:
            continue
        ends.sort(key=lambda end: -max(p["mean"] for p in end[1]["points"][1:]))
        shown = [
            f"{c['label']} {max(p['mean'] for p in c['points'][1:]):.3f}"
            f"{'' if (price := _rate(summary, c)) is None else f' at {dollars(1000 * price)} for 1,000 accepted queries'}"
            for _, c in ends
        ]
        many = len({c["base"] for c in summary["curves"]}) > 1
        sentences.append(f"Generators{f' for {base}' if many else ''}, best {summary['measure']}: {', '.join(shown)}.")
    return sentences


def _rate(summary: Json, curve: Json) -> float | None:
    funnels = [g for g in summary["generators"] if g["name"] == curve["generator"]]
    return funnels[0]["price_per_accepted"] if len(funnels) == 1 else None


def _position(queries: int, score: Json, worth: float) -> str:
    """How an arm compares with another by the interval of the difference; level only if both ends are near 0."""
    if queries >= QUERIES and (score["delta_low"] > 0 or score["delta_high"] < 0):
        return "is above it" if score["delta_low"] > 0 else "is below it"
    if rules_out(queries, score, worth) and score["delta_low"] > -worth and score["delta_high"] < worth:
        return "is level with it"
    return "cannot be distinguished from it"


def _bm25(summary: Json) -> list[str]:
    sentences = []
    for data in summary["sets"]:
        scored = [t for t in summary["trials"] if data["name"] in t["scores"] and t["kind"] == "augmented"]
        rows = [(t, t["scores"][data["name"]][summary["measure"]]) for t in scored]
        rows = [(t, s) for t, s in rows if "over_bm25" in s]
        if not rows:
            continue
        best, score = max(rows, key=lambda row: row[1]["mean"])
        over = score["over_bm25"]
        word = _position(data["queries"], {"mean": score["mean"], **over}, summary["worth"])
        which = f"{best['used']:,} {best['label']} queries, {best['base']}"
        sentences.append(
            f"Against BM25 on {data['name']}: the best arm ({which}) {word} "
            f"({score['mean']:.3f} and {score['mean'] - over['delta']:.3f}; {signed(over['delta'])}, "
            f"{summary['interval']} {signed(over['delta_low'])} to {signed(over['delta_high'])})."
        )
    return sentences


def _cost(summary: Json) -> list[str]:
    total = summary["total"]
    tokens = total["prompt_tokens"] + total["completion_tokens"]
    sentences = [
        f"Cost: {duration(summary['wall_s'])} of wall-clock time, {duration(total['seconds'])} of stages, {tokens:,} tokens, "
        f"{_price(summary)}."
    ]
    for g in summary["generators"]:
        if g["accepted"]:
            sentences.append(
                f"{g['generator']}: {g['accepted']:,} of {g['completions']:,} completions became training rows; an accepted "
                f"query took {g['tokens_per_accepted']:,.0f} tokens and {g['seconds_per_accepted']:.2f} s; 1,000 of them cost "
                f"{dollars(1000 * g['price_per_accepted'])}.{_cached(g)}"
            )
        else:
            sentences.append(f"{g['generator']}: none of {g['completions']:,} completions was accepted.")
    return sentences


def _price(summary: Json) -> str:
    """The price in dollars with its rates, and the costs that it does not include."""
    total, rates = summary["total"], summary.get("rates", [])
    price = dollars(total["price"]) + (f" for busy workers (at {'; '.join(rates)})" if rates else "")
    extra = [
        f"{dollars(total[f'{line}_price'])} for {name}" for line, name in (("setup", "set-up"), ("waiting", "waiting"))
    ]
    return f"{price}, plus {' and '.join(extra)}" if total["setup_price"] + total["waiting_price"] > 0 else price


def _cached(generator: Json) -> str:
    if not generator["prompt_tokens"]:
        return ""
    share = generator["cached_tokens"] / generator["prompt_tokens"]
    return f" Of its {generator['prompt_tokens']:,} prompt tokens, {share:.0%} came from the engine's cache."
