"""What a judge is, and the one by rules: does the thinking conclude the answer that is given?

A recipe's `judge` is made in recipe/verify_stage.py (`make_judge`), that of the consistency reward in reward.py.

`rules` compares what `conclusions.py` reads, without a model. It prefers "unknown" to a guess; how often it is right, by
labelled chains: tests/test_judges_rules.py.
"""

import functools
import re
from collections import Counter
from inspect import isawaitable

from veripo_trl.answers.numbers import read_number
from veripo_trl.answers.score import answers_match, score_answer, split_completion
from veripo_trl.errors import SolutionError, VeripoError
from veripo_trl.user_functions import user_function
from veripo_trl.verifier.conclusions import conclude, same_text

CONSISTENCIES = ("consistent", "inconsistent", "unknown")
_GRADED = ("temporal grounding", "grounded choice", "object and time", "box grounding")
_NUMERIC = ("numerical", "regression")
_KINDS = {"consistency": str, "concluded_answer": str | None, "reason": str}  # of a verdict


def verdict(consistency: str, concluded_answer: str | None, reason: str = "") -> dict:
    return {"consistency": consistency, "concluded_answer": concluded_answer, "reason": reason}


def conclude_by_rules(think: str, **task) -> str | None:
    """The answer that the thinking announces last, in a form `answers_match` reads; None if it announces none, several at
    once, or takes the last one back. `task`: `problem_type`, `options`."""
    conclusion = conclude(think, **task)
    return conclusion.answer if conclusion.announced else None


def judge_by_rules(completion: str, *, problem_type: str, options=None) -> str:
    """ "consistent", "inconsistent" or "unknown" for a completion. Unknown: no single think or answer span, no clear
    conclusion, or texts that may say the same in other words."""
    think, answer = split_completion(completion)
    if not think or not answer:
        return "unknown"
    task = {"problem_type": problem_type, "options": options}
    return _verdict_by_rules({"think": think, "answer": answer, **task})["consistency"]


@functools.lru_cache(maxsize=2048)  # the rollouts of a group say the same few things
def _match(concluded: str, answer: str, problem_type: str, options: tuple) -> bool | None:
    if problem_type in ("OCR", "free-form"):
        return same_text(concluded, answer, exact=problem_type == "OCR")
    same = answers_match(concluded, answer, problem_type=problem_type, options=options)
    if not same and problem_type in _GRADED:
        try:
            near = score_answer(answer, problem_type=problem_type, solution=concluded, options=options)
        except SolutionError:  # a box without width, say: nothing can be compared with it
            return None
        return None if near > 0.5 else False  # what is near may be the same, rounded
    return same or (problem_type in _NUMERIC and _is_rounded(float(concluded.rstrip("%")), answer))


def _is_rounded(value: float, answer: str) -> bool:
    """Whether the answer is the value rounded to the answer's places: 2.37, "2.4"."""
    number = re.search(r"-?\d+(?:\.(\d+))?", answer)
    if not number or value == int(value):
        return False
    return abs(value - float(number[0])) <= 0.5 * 10 ** -len(number[1] or "") + 1e-9


_UNITS = (
    r"((?:[cdkm]?[gms]|km/h|m/s|in|ft|h|k)\b|\w*met(?:er|re)|inch|feet|foot|yard|mile|\w*gram|pound"
    r"|sec|min|hour|day|year)"
)
_FACTORS = (3.281, 3.6, 10, 12, 24, 60, 100, 1000, 3600)


def _is_converted(concluded: str, think: str, answer: str) -> bool:
    """Whether the answer may be the thinking's number in another unit: "250 cm" and "2.5"."""
    number, value = read_number(answer), float(concluded.rstrip("%"))
    units = re.findall(rf"(\d[\d,]*(?:\.\d+)?)\s?{_UNITS}", think[-200:].casefold())
    said = {unit for one, unit in units if float(one.replace(",", "")) == value}
    given = set(re.findall(rf"\d\s?{_UNITS}", answer.casefold()))
    if said & given or not (said or given) or number is None or not number[0] or not value:
        return False
    ratio = abs(number[0] / value)
    return any(0.98 <= each / factor <= 1.02 for each in (ratio, 1 / ratio) for factor in _FACTORS)


def _verdict_by_rules(item: dict) -> dict:
    think, answer, problem_type = item["think"], item["answer"], item["problem_type"]
    options = tuple(item["options"] or ())
    conclusion = conclude(think, problem_type=problem_type, options=options)
    concluded = conclusion.answer
    same = None if concluded is None else _match(concluded, answer, problem_type, options)
    if same:
        return verdict("consistent", concluded)
    if same is None and concluded is not None:
        return verdict("unknown", concluded, "other words: they may say the same")
    if same is None or not conclusion.named:
        return verdict("unknown", concluded, "no conclusion: the rules read none")
    if problem_type in _NUMERIC and _is_converted(concluded, think, answer):
        return verdict("unknown", concluded, "another unit: they may say the same")
    return verdict("inconsistent", concluded)


def shown_model(model: str, *, is_path: bool = False) -> str:
    """A judge's model as others may read it: of a path of this machine the last part; any other name as it is."""
    path = is_path or model.count("/") > 1 or model.startswith(("/", "~", ".")) or "\\" in model
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] if path else model


class JudgeError(VeripoError):
    """The judge cannot go on. What it had said is in the cache: the same command continues from there."""


class Judge:
    """A judge is one coroutine, `await judge(item) -> verdict`, and says who it is: what is below is there to override.

    An item is a dict `think, answer, problem_type, options`; a verdict is `consistency ("consistent", "inconsistent" or
    "unknown"), concluded_answer (text or None), reason`, of a judge that `caches` also `reply`: what `settle` can make
    the verdict from again, None for nothing. It runs in the caller's thread, where maths may be compared.
    """

    name: str  # who judged, and by what text: both stand in verdicts and in the cache's key
    prompt_version = ""
    caches = False
    concurrency = 1  # items that are asked at once

    def __init__(self):
        # what judging took; failures by their cause
        self.requests, self.retries, self.failures = 0, 0, Counter()

    async def __call__(self, item: dict) -> dict:
        raise NotImplementedError

    async def close(self) -> None:
        """After the last item, or an error: in the event loop that the items were asked in."""

    def record(self) -> dict:
        """Who judged, and what it took: for results.json."""
        counted = ("name", "prompt_version", "requests", "retries")
        return {**{key: getattr(self, key) for key in counted}, "failures": dict(self.failures)}

    def summary(self) -> str:
        return f"Judged by {self.name}, asked {self.requests:,} times."


class RulesJudge(Judge):
    """The judge that needs no model."""

    name = "rules"

    async def __call__(self, item: dict) -> dict:
        return _verdict_by_rules(item)


class UserJudge(Judge):
    """A coroutine of the user's own, `async def judge(item) -> verdict`, as `Judge` has it; not cached."""

    def __init__(self, name: str, *, concurrency: int):
        """
        Raises:
            ConfigError: `name`, as `module:function`, cannot be imported.
            JudgeError: `concurrency` is no int above 0.
        """
        super().__init__()
        if type(concurrency) is not int or concurrency < 1:
            raise JudgeError(f"judge {name}: concurrency: expected int, 1 or more; got {concurrency!r}.")
        self.name, self.concurrency = name, concurrency
        self.judge = user_function(name, setting="judge")

    async def __call__(self, item: dict) -> dict:
        self.requests += 1
        asked = self.judge(item)
        if not isawaitable(asked):
            raise JudgeError(f"judge {self.name}: expected a coroutine, `async def`; what came returned {asked!r:.200}.")
        said = await asked
        found = said if isinstance(said, dict) else {}
        fits = all(key in found and isinstance(found[key], kind) for key, kind in _KINDS.items())
        if not fits or found["consistency"] not in CONSISTENCIES:
            raise JudgeError(
                f"judge {self.name}: expected a dict of texts, {', '.join(_KINDS)}, its consistency one of "
                f"{', '.join(CONSISTENCIES)}; came {said!r:.200}."
            )
        return said
