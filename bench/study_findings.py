"""The findings of bench/STUDY.md in plain words, put together from the figures, whatever came out.

A row counts as ahead or behind only where several seeds and a corrected p below 0.05 say so.
"""

import math
import textwrap

import numpy as np

from bench.study_figures import GRPO, PTA, SMALL, UNITS, p_text, percent, settled, token_cost

CONTROL = "a tree or as many steps of GRPO"


def verdict(test: dict, other: str) -> str:
    """Where the first row ends beside `other`, the interval, and whether chance explains it."""
    low, high, size = 100 * test["low"], 100 * test["high"], f"{100 * abs(test['delta']):.1f}"
    place = f"{size} points {'ahead of' if test['delta'] > 0 else 'behind'} {other}"
    place = f"level with {other}" if size == "0.0" else place
    place += f" (95 % interval {low:+z.1f} to {high:+z.1f}, corrected p {p_text(test['holm'])})"
    if test["seeds"] == 1:
        return f"{place} in one seed, which says nothing about others"
    luck = ", which is within chance" if settled(test) == "level" else ", more than chance explains"
    return place + ("" if size == "0.0" else luck)


def trees(f: dict) -> dict[str, dict]:
    """Rows with several CoTs per plan that start from SFT -> their tests against GRPO."""
    tests = f["against"].items()
    return {row: t for row, t in tests if f["rows"][row]["z"] > 1 and "no SFT" not in row}


def does_it_pay(figures: list[dict]) -> str:
    """The first paragraph: trees against independent completions."""
    counts, said, wins, losses = [], [], [], 0
    figures = [f for f in figures if trees(f)]
    for f in figures:
        task, rows, places = f["task"], f["rows"], [settled(test) for test in trees(f).values()]
        ahead, behind = places.count("ahead"), places.count("behind")
        wins, losses = wins + [task] * (ahead > 0), losses + behind
        counts.append(f"{ahead} of {len(places)} on {task} ({behind} behind)")
        if test := f["against"].get(PTA):
            gaps = [rows[PTA]["curve"][unit] - rows[GRPO]["curve"][unit] for unit in UNITS]
            a, b, c = (f"{100 * gap:+z.1f}" for gap in gaps)
            said.append(
                f"On {task}, PTA-GRPO ends {verdict(test, 'GRPO')}. Along the training curves the "
                f"difference is {a} points at equal completions, {b} at equal tokens and {c} at "
                "equal seconds."
            )
            ratio = rows[PTA]["decoded"] / rows[GRPO]["decoded"]
            if abs(ratio - 1) > 0.05:
                said.append(f"PTA-GRPO's runs decoded {100 * ratio:.0f} % of GRPO's tokens.")
        said += as_many_steps(f)
        best = max(trees(f), key=lambda row: np.mean(rows[row]["held_out"]))
        if best != PTA:
            test = trees(f)[best]
            said.append(f'The best tree on {task}, "{best}", ends {verdict(test, "GRPO")}.')
    if not figures:
        return "No plan tree has been compared with independent completions yet."
    if wins:
        rest = [f["task"] for f in figures if f["task"] not in wins]
        control = [settled(f["contrasts"][CONTROL]) for f in figures
                   if f["task"] in wins and CONTROL in f["contrasts"]]
        answer = f"A plan tree pays on {' and '.join(wins)}"
        answer += f", not on {' and '.join(rest)}" if rest else ""
        if control and "ahead" not in control:
            answer += "; beside smaller groups of plain GRPO no gain is beyond chance"
    else:
        answer = "No plan tree has been seen to pay" + ", and some do harm" * bool(losses)
    return (
        f"**{answer}.** Tree settings that are ahead of GRPO beyond chance, at equal decoded "
        f"tokens: {', '.join(counts)}. {' '.join(said)}"
    )


def as_many_steps(f: dict) -> list[str]:
    """The control: plain GRPO that takes as many steps for the same tokens."""
    plain, control = f["against"].get(SMALL), f["contrasts"].get(CONTROL)
    if not (plain and control):
        return []
    return [
        "A tree takes more steps for the same tokens, and so does GRPO with fewer completions per "
        f"question: that ends {verdict(plain, 'GRPO 12x1')}. Beside it, a tree without plan reward "
        f"ends {verdict(control, 'these smaller groups')}."
    ]


def what_the_parts_do(figures: list[dict]) -> str:
    """The second paragraph: the plan reward, credit, and the format reward."""
    said, matters = [], []
    for f in figures:
        tests, corr, task = f["contrasts"], f["rows"].get(PTA, {}).get("credit_corr"), f["task"]
        if test := tests.get("what the plan reward does"):
            without = verdict(test, "one without")
            said.append(f"On {task}, the tree with plan reward ends {without}.")
            shows = settled(test) != "level"
            matters += [f"the plan reward on {task}"] * shows
            if corr is not None:
                said.append(
                    f"Advantages with and without it correlate {corr:.4f}, so "
                    f"{'hardly any' if corr > 0.99 else 'some'} effect was to be expected"
                    f"{', yet there is one' if shows and corr > 0.99 else ''}."
                )
        if test := tests.get("what unbiased credit does"):
            other = "the same tree with the group's mean as baseline"
            said.append(f"Unbiased segment credit on {task} ends {verdict(test, other)}.")
            matters += [f"segment credit on {task}"] * (settled(test) != "level")
        for change in (name for name in tests if "r_format" in name or "length reward" in name):
            if settled(tests[change]) != "level":  # of these, only what shows is worth a sentence
                said.append(f"On {task}, {change} ends {verdict(tests[change], 'PTA-GRPO')}.")
                matters.append(f"{change} on {task}")
    if not said:
        return "The rows that show what plan reward and credit do are not finished."
    answer = "Neither plan reward nor segment credit has been seen to make a difference"
    if matters:
        answer = f"Of the parts, these make a difference: {'; '.join(matters)}"
    return f"**{answer}.** {' '.join(said)}"


def why(figures: list[dict]) -> str:
    """The third paragraph: the mechanism, where trees help and where they do not."""
    said = []
    for f in (f for f in figures if f["facts"] and trees(f)):
        facts, task, wins = f["facts"], f["task"], "ahead" in map(settled, trees(f).values())
        cost, plan, cot = token_cost(facts, 3), facts["plan_tokens"], facts["cot_tokens"]
        change = f"{100 * abs(1 - cost):.0f} % {'fewer' if cost < 1 else 'more'} tokens"
        best = f"is {facts['best']:.1f}" if math.isfinite(facts["best"]) else "has no limit"
        said.append(
            f"On {task} the plan decides {100 * facts['icc']:.0f} % of the variance of outcomes "
            f"before RL, and plans of {plan:.0f} tokens stand before CoTs of {cot:.0f}. So z\\* "
            f"{best}: three CoTs per plan need {change} than one for the same precision of the "
            "plan's gradient."
        )
        control = f["contrasts"].get(CONTROL)
        if wins and control and settled(control) != "ahead":
            said.append("Trees are ahead of 12 completions, but not, beyond chance, of plain GRPO "
                        "with as many steps: so far it is the number of steps that shows, not a "
                        "more precise gradient.")
        elif wins and cost >= 0.95:
            said.append("That a tree is ahead all the same must come from elsewhere, perhaps from "
                        "what a CoT's siblings tell it.")
        elif wins:
            said.append("The tree that is ahead fits that.")
        elif cost < 0.95:
            said.append("That saving has not shown in accuracy, so the noise of the plan's "
                        "gradient is not what limits learning there.")
        else:
            ratio = 9 * cot / plan
            longer = 9 * cot * facts["tau2"] / max(facts["sigma2"], 1e-9)
            said.append("Such a tree saves little or nothing there. For three CoTs per plan to be "
                        f"best, the plan would have to decide only {100 / (1 + ratio):.0f} %, or "
                        f"plans would have to be {longer:.0f} tokens long.")
        end = f["rows"].get(PTA, {}).get("icc")
        if end is not None:
            said.append(f"At the end of PTA-GRPO's training the plan decides {100 * end:.0f} %.")
        said += room_for_plans(f)
    return "**Why.** " + " ".join(said) if said else "Too little is finished to say why."


def room_for_plans(f: dict) -> list[str]:
    """How much better plans could add, and how many are best after training."""
    use, rows, said = f["start_use"], f["rows"], []
    if use["true"] is not None:
        room = 100 * (use["true"] - use["own"])
        could = f"could add {room:.1f} points" if room > 0.05 else "would add nothing"
        said.append(f"With the true plan the SFT model is right in {percent(use['true'])} % of "
                    f"samples, with its own in {percent(use['own'])} %: better plans alone "
                    f"{could}.")
    best = [rows[row]["did"].get("best") for row in (GRPO, PTA) if row in rows]
    if len(best) == 2 and None not in best:
        left = ", so plans are no longer what is missing" if min(best) > 0.95 else ""
        said.append(f"After training, {percent(best[0])} % of GRPO's plans are best and "
                    f"{percent(best[1])} % of PTA-GRPO's{left}.")
    return said


def findings(figures: list[dict]) -> str:
    """Three paragraphs, from the `task_figures` of all tasks."""
    parts = (does_it_pay(figures), what_the_parts_do(figures), why(figures))
    wrap = dict(width=100, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(textwrap.fill(part, **wrap) for part in parts) + "\n"
