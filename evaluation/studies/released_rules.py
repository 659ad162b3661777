"""How our scores differ from the rules of the released reward functions, on random answers in many forms.

    python evaluation/studies/released_rules.py

For each rule 3,000 answers, some as the prompts ask for them and some as models write them besides. Their rules are
written here anew, as short as they can be said, from what reading and running the released code has shown. A form on
which both always agree has no reason; the table of the others is in docs/results.md.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from veripo_trl.answers.choice import partial_credit
from veripo_trl.answers.grammars import is_structured
from veripo_trl.answers.rewards import reward_function
from veripo_trl.answers.score import extract_answer, score_answer
from veripo_trl.errors import run

ANSWERS = 3_000
SPAN, OBJECT, LETTERS, PERCENT = "4 to 12 of 20", "2; 4 to 12 of 20", "A,C", "50"
OPTIONS = ["A. a cat", "B. a dog", "C. a bird", "D. a fish"]

# -------------------------------------------------------------------------------------------------------- their rules


def _last_span(text: str) -> tuple[float, float] | None:
    found = re.findall(r"(\d+(?:\.\d+)?)\s+(?:to|and)\s+(\d+(?:\.\d+)?)", text, re.I)
    return tuple(map(float, found[-1])) if found else None


def _hull_iou(span: tuple[float, float] | None) -> float:
    if span is None or span[0] > span[1]:
        return 0.0
    (s, e), (true_s, true_e) = span, (4.0, 12.0)
    return max(0.0, min(e, true_e) - max(s, true_s)) / (max(e, true_e) - min(s, true_s))


def _last_answer(completion: str) -> str:
    spans = re.findall(r"<answer>(.*?)</answer>", completion, re.S)
    return spans[-1].strip() if spans else ""


def time_zero(completion: str) -> float:
    return _hull_iou(_last_span(_last_answer(completion)))


def time_r1(completion: str) -> float:
    span = _last_span(_last_answer(completion))
    return _hull_iou(span) * (1 - abs(span[0] - 4) / 20) * (1 - abs(span[1] - 12) / 20) if span else 0.0


def video_chat_r1(completion: str) -> float:
    letter = re.search("[A-G]", _last_answer(completion))
    return float(bool(letter) and letter[0] == "B")


def stvg_r1(completion: str) -> float:
    answer = _last_answer(completion)
    number = re.search(r"target id:\s*(\d+)", answer, re.I)
    time = re.search(r"time range:.*?(\d+(?:\.\d+)?)\s+(?:to|and)\s+(\d+(?:\.\d+)?)", answer, re.I | re.S)
    if not number or not time:
        return 0.0
    return (float(number[1] == "2") + _hull_iou(tuple(map(float, time.groups())))) / 2


def tw_grpo(completion: str) -> float:
    said = set((_last_answer(completion) or completion).replace(" ", "").split(","))
    truth = set(LETTERS.split(","))
    return len(said) / len(truth) if said <= truth else 0.0


def primo(completion: str) -> float:
    text = _last_answer(completion)
    try:
        value = float(text.rstrip("% ")) / (100 if "%" in text else 1)
    except ValueError:
        return 0.0
    return min(max(1 - abs(value - 50) / 100, 0.0), 1.0)


def primo_sections(completion: str) -> float:
    inside = r"\s*".join(f"<{name}>.*?</{name}>" for name in ("planning", "observation", "reasoning"))
    return float(re.fullmatch(rf"<think>{inside}</think>\s*<answer>.*?</answer>", completion, re.S) is not None)


# ------------------------------------------------------------------------------------------------------------ answers


def _times(rng: random.Random) -> tuple[float, float]:
    start = round(rng.uniform(0, 12), 1)
    return start, round(start + rng.uniform(0.5, 9), 1)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


SPANS = {  # form: (how it is written, why ours differs)
    "12.5 to 17.8": (lambda s, e, r: f"{s} to {e}", ""),
    "from … to … seconds": (lambda s, e, r: f"from {s} to {e} seconds", ""),
    "units: 6s to 10s": (lambda s, e, r: f"{s}s to {e}s", 'theirs reads a bare number before "to" only, 0 else'),
    "clock: 00:06 to 00:10": (
        lambda s, e, r: f"{_clock(s)} to {_clock(e)}",
        "theirs reads the seconds' digits or nothing",
    ),
    "dash: 6 - 10": (lambda s, e, r: f"{s} - {e}", 'theirs knows "to" and "and" only, 0 else'),
    "one span, then another": (
        lambda s, e, r: f"0 to 2, finally {s} to {e}",
        "theirs takes the last; ours the union of both",
    ),
    "a number beside it": (lambda s, e, r: f"{s} to {e}, after 3 jumps", "every number must belong to a span: else 0"),
    "a hedge": (lambda s, e, r: f"{s} to {e}, or maybe later", "a hedge is no clear answer: 0"),
    "minutes": (lambda s, e, r: f"{s} to {e} minutes", "another unit is no time in seconds: 0"),
    "reversed": (lambda s, e, r: f"{e} to {s}", ""),
    "no span": (lambda s, e, r: f"around {s}", ""),
}
FAR = {
    "end far over the clip": (
        lambda s, e, r: f"{s} to {e + r.uniform(10, 60):.1f}",
        "theirs goes below 0; factors are clamped",
    )
}
LETTER = {
    "B": (lambda x, r: x, ""),
    "(B)": (lambda x, r: f"({x})", ""),
    "B. its text": (lambda x, r: OPTIONS["ABCD".index(x)], ""),
    "Answer: B": (lambda x, r: f"Answer: {x}", "theirs takes the first capital from A to G, the A of \"Answer\""),
    "prose": (lambda x, r: r.choice(["Because of the end", "Clearly", "A dog, I think", "Both"]),
              "theirs reads a letter into words"),
    "B or C": (lambda x, r: f"{x} or C", "two options are no clear answer: 0"),
    "lower case": (lambda x, r: x.lower(), "theirs knows capitals only"),
    "the option's text": (lambda x, r: OPTIONS["ABCD".index(x)][3:], "the text names its option"),
}  # fmt: skip
OBJECTS = {
    "Target ID: 2, Time range: …": (lambda i, s, e: f"Target ID: {i}, Time range: {s} to {e}", ""),
    "target id: 2; time range: … and …": (lambda i, s, e: f"target id: {i}; time range: {s} and {e}", ""),
    "2; 5 to 11": (lambda i, s, e: f"{i}; {s} to {e}", "the solution's own form, 0 there"),
    "JSON": (lambda i, s, e: f'{{"id": {i}, "start": {s}, "end": {e}}}', "a form of ours, 0 there"),
    "two ids": (
        lambda i, s, e: f"Target ID: {i} or {i + 1}, Time range: {s} to {e}",
        "theirs takes the first; ours refuses two",
    ),
    "reversed span": (
        lambda i, s, e: f"Target ID: {i}, Time range: {e} to {s}",
        "theirs keeps the id's half; one rule for all spans: 0",
    ),
    "span with units": (lambda i, s, e: f"Target ID: {i}, Time range: {s}s to {e}s", "0 there"),
    "two spans": (
        lambda i, s, e: f"Target ID: {i}, Time range: {s} to {e}; 18 to 19",
        "theirs takes the first; one is asked for: 0",
    ),
    "id only": (lambda i, s, e: f"Target ID: {i}", ""),
    "span only": (lambda i, s, e: f"Time range: {s} to {e}", ""),
}
CHOICES = {
    "A,C": (lambda x, r: ",".join(x), ""),
    "C, A": (lambda x, r: ", ".join(reversed(x)), ""),
    "A and C": (lambda x, r: " and ".join(x), "as written it is no letter there: 0"),
    "AC": (lambda x, r: "".join(sorted(x)), "as written it is no letter there: 0"),
    "a, c": (lambda x, r: ", ".join(x).lower(), "as written it is another letter there: 0"),
    "A. … , C. …": (
        lambda x, r: ", ".join(OPTIONS["ABCD".index(each)] for each in x),
        "as written it is no letter there: 0",
    ),
    "A,A": (lambda x, r: f"{x[0]},{x[0]}", ""),
    "nothing": (lambda x, r: "", ""),
}
NUMBERS = {
    "45": (lambda n, r: f"{n}", ""),
    "45%": (lambda n, r: f"{n}%", "theirs divides by 100 and compares .45 with 50; ours as written"),
    "45 percent, done": (lambda n, r: f"about {n} percent done", "theirs cannot convert words: 0"),
    "two numbers": (lambda n, r: f"{n} or {n + 10}", ""),
    "over the range": (lambda n, r: f"{n + 150}", ""),
}
P, O, R = ("<planning>p</planning>", "<observation>o</observation>", "<reasoning>r</reasoning>")
SECTIONS = {
    "as asked": (lambda r: f"<think>{P}{O}{R}</think><answer>45</answer>", ""),
    "lines between": (lambda r: f"<think>{P}\n{O}\n{R}</think>\n<answer>45</answer>", ""),
    "a line after <think>": (
        lambda r: f"<think>\n{P}\n{O}\n{R}\n</think>\n<answer>45</answer>",
        "theirs takes none there: 0",
    ),
    "one missing": (lambda r: f"<think>{P}{R}</think><answer>45</answer>", ""),
    "swapped": (lambda r: f"<think>{O}{P}{R}</think><answer>45</answer>", ""),
    "one twice": (lambda r: f"<think>{P}{P}{O}{R}</think><answer>45</answer>", "theirs reads over it: 1"),
    "one empty": (
        lambda r: f"<think>{P}<observation></observation>{R}</think><answer>45</answer>",
        "theirs takes it: 1",
    ),
    "two answers": (
        lambda r: f"<think>{P}{O}{R}</think><answer>45</answer><answer>50</answer>",
        "theirs reads over it: 1",
    ),
    "text after": (lambda r: f"<think>{P}{O}{R}</think><answer>45</answer> so", ""),
}


class Rule(NamedTuple):
    """`write`: (form's writer, a random source) -> a completion; `theirs`, `ours`: of that completion."""

    name: str
    forms: dict[str, tuple[Callable, str]]
    write: Callable[[Callable, random.Random], str]
    theirs: Callable[[str], float]
    ours: Callable[[str], float]


def _answer(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def _ours(problem_type: str, solution: str, reward=None, options=None) -> Callable[[str], float]:
    def score(completion: str) -> float:
        row = {"problem_type": problem_type, "solution": solution, "options": options}
        if reward:
            return reward([completion], [solution], [problem_type], [options])[0]
        return score_answer(extract_answer(completion), **row)

    return score


def _letters(rng: random.Random) -> list[str]:
    return sorted(rng.sample("ABCD", rng.randint(1, 3)))


def _grounded(completion: str) -> float:
    answer = f"{extract_answer(completion)}; 4 to 12"
    return _ours("grounded choice", "B; 4 to 12", reward_function("grounded_letter"), OPTIONS)(_answer(answer))


def _soft(completion: str) -> float:
    row = {"problem_type": "multiple choice", "solution": LETTERS, "options": OPTIONS}
    return score_answer(extract_answer(completion), **row, score=partial_credit)


RULES = [
    Rule("temporal grounding: tIoU (TimeZero)", SPANS, lambda w, r: _answer(w(*_times(r), r)), time_zero,
         _ours("temporal grounding", SPAN, reward_function("tiou"))),
    Rule("temporal grounding: Time-R1's", SPANS | FAR, lambda w, r: _answer(w(*_times(r), r)), time_r1,
         _ours("temporal grounding", SPAN, reward_function("tiou_time_r1"))),
    Rule("grounded choice: letter (VideoChat-R1)", LETTER, lambda w, r: _answer(w(r.choice("ABCD"), r)), video_chat_r1,
         _grounded),
    Rule("object and time: id and tIoU (STVG-R1)", OBJECTS, lambda w, r: _answer(w(r.randint(1, 4), *_times(r))), stvg_r1,
         _ours("object and time", OBJECT)),
    Rule("multiple choice: partial credit (TW-GRPO)", CHOICES, lambda w, r: _answer(w(_letters(r), r)), tw_grpo, _soft),
    Rule("regression: absolute range (PRIMO R1)", NUMBERS, lambda w, r: _answer(w(r.randint(0, 100), r)), primo,
         _ours("regression", PERCENT, reward_function("accuracy_absolute_range"))),
    Rule("sections (PRIMO R1)", SECTIONS, lambda w, r: w(r), primo_sections,
         lambda completion: float(is_structured(completion, ("planning", "observation", "reasoning")))),
]  # fmt: skip


def yes_no_groups(answers: int, rng: random.Random) -> tuple[int, int]:
    """PRIMO R1's boolean reward returns from inside its loop: a group gets its first rollout's score. (answers whose own
    score it is not, answers in groups that are left without any difference though they have one)."""
    wrong = silent = 0
    for _ in range(answers // 8):
        group = [rng.choice(["Yes", "No"]) for _ in range(8)]
        ours = [score_answer(said, problem_type="yes/no", solution="yes") for said in group]
        wrong += sum(score != ours[0] for score in ours)
        silent += 8 * (len(set(ours)) > 1)
    return wrong, silent


def compare(answers: int = ANSWERS, *, seed: int = 0) -> list[dict]:
    """One dict per rule and form: `rule, form, answers, differ, theirs, ours` (mean scores), `reason`."""
    rows = []
    for rule in RULES:
        rng, counts, totals = random.Random(seed), Counter(), Counter()
        for _ in range(answers):
            form = rng.choice(list(rule.forms))
            completion = rule.write(rule.forms[form][0], rng)
            theirs, ours = rule.theirs(completion), rule.ours(completion)
            counts[form, "answers"] += 1
            counts[form, "differ"] += abs(theirs - ours) > 1e-9
            totals[form, "theirs"] += theirs
            totals[form, "ours"] += ours
        for form, (_, reason) in rule.forms.items():
            number = counts[form, "answers"]
            means = {whose: totals[form, whose] / number for whose in ("theirs", "ours")} if number else {}
            rows.append({"rule": rule.name, "form": form, "answers": number, "differ": counts[form, "differ"], **means,
                         "reason": reason})  # fmt: skip
    return rows


def main() -> None:
    rows = compare()
    print("| rule | form of the answer | differ | theirs | ours | why |\n|---|---|---:|---:|---:|---|")
    for row in rows:
        if row["differ"]:
            cells = f"{row['differ']}/{row['answers']} | {row['theirs']:.2f} | {row['ours']:.2f}"
            print(f"| {row['rule']} | {row['form']} | {cells} | {row['reason']} |")
    for name in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == name]
        alike = ", ".join(row["form"] for row in own if not row["differ"])
        print(f"\n{name}: {sum(row['differ'] for row in own):,} of {ANSWERS:,} differ; none of: {alike}.")
    wrong, silent = yes_no_groups(ANSWERS, random.Random(0))
    print(f"\nyes/no (PRIMO R1): {wrong:,} of {ANSWERS:,} get another rollout's score, {silent:,} are in groups that it "
          "leaves without a difference.")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
