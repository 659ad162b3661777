"""What a judge is, and the one by rules: does the thinking conclude the answer that is given?

`rules` compares what `conclusions.py` reads, without a model. It prefers "unknown" to a guess; how often it is right, by
labelled chains: tests/test_judges_rules.py.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence

from veripo_trl.answers.numbers import read_number
from veripo_trl.answers.score import answers_match, split_completion
from veripo_trl.errors import VeripoError
from veripo_trl.user_functions import user_function
from veripo_trl.verifier.conclusions import conclude, same_text

CONSISTENCIES = ("consistent", "inconsistent", "unknown")
_VERDICT = {"consistency", "concluded_answer", "reason"}


def conclude_by_rules(think: str, *, problem_type: str, options: Sequence[str] | None = None) -> str | None:
    """The answer that the thinking announces last, in a form `answers_match` reads ("B", "A,C", "3.0", "12.0%", LaTeX,
    text); None if it announces none, several at once, or takes the last one back."""
    conclusion = conclude(think, problem_type=problem_type, options=options)
    return conclusion.answer if conclusion.announced else None


def judge_by_rules(completion: str, *, problem_type: str, options: Sequence[str] | None = None) -> str:
    """ "consistent", "inconsistent" or "unknown" for a completion. Unknown: no single think or answer span, no clear
    conclusion, or texts that may say the same in other words."""
    think, answer = split_completion(completion)
    if not think or not answer:
        return "unknown"
    return _verdict_by_rules(think, answer, problem_type, options)["consistency"]


@functools.lru_cache(maxsize=2048)  # the rollouts of a group say the same few things
def _match(conclusion: str, answer: str, problem_type: str, options: tuple[str, ...]) -> bool | None:
    if problem_type in ("OCR", "free-form"):
        return same_text(conclusion, answer, exact=problem_type == "OCR")
    return answers_match(conclusion, answer, problem_type=problem_type, options=options) or (
        problem_type in ("numerical", "regression") and _is_rounded(conclusion, answer)
    )


def _is_rounded(conclusion: str, answer: str) -> bool:
    """Whether the answer is the conclusion rounded to the answer's places: "2.37", "2.4"."""
    number = re.search(r"-?\d+(?:\.(\d+))?", answer)
    try:
        value = float(conclusion.rstrip("%"))
    except ValueError:
        return False
    if not number or value == int(value):
        return False
    return abs(value - float(number[0])) <= 0.5 * 10 ** -len(number[1] or "") + 1e-9


_UNIT = re.compile(
    r"(\d[\d,]*(?:\.\d+)?)\s?([mcdk]?m|met(?:er|re)s?|\w+met(?:er|re)s?|in|inch(?:es)?|f(?:ee|oo)?t|yards?|miles?"
    r"|mg|k?g|k?grams?|kilos?|lbs?|pounds?|m?s|sec(?:ond)?s?|min(?:ute)?s?|h|hrs?|hours?|days?|weeks?|months?|years?"
    r"|mph|km/h|m/s|k)(?!\w)",
    re.I,
)
_FACTORS = (3.281, 3.6, 10, 12, 24, 60, 100, 1000, 3600)


def _is_converted(concluded: str, think: str, answer: str, problem_type: str) -> bool:
    """Whether the answer may be the thinking's number in another unit: "250 cm" and "2.5"."""
    if problem_type not in ("numerical", "regression"):
        return False
    number, value = read_number(answer), float(concluded.rstrip("%"))
    said = {unit for one, unit in _UNIT.findall(think[-200:].casefold()) if float(one.replace(",", "")) == value}
    given = {unit for _, unit in _UNIT.findall(answer.casefold())}
    if said & given or not (said or given):
        return False
    if number is None or not number[0] or not value:
        return False
    ratio = abs(number[0] / value)
    return any(0.98 <= each / factor <= 1.02 for each in (ratio, 1 / ratio) for factor in _FACTORS)


def _verdict_by_rules(think: str, answer: str, problem_type: str, options: Sequence[str] | None) -> dict:
    conclusion = conclude(think, problem_type=problem_type, options=options)
    concluded = conclusion.answer
    same = None if concluded is None else _match(concluded, answer, problem_type, tuple(options or ()))
    if same:
        consistency, reason = "consistent", ""
    elif same is False and conclusion.named and not _is_converted(concluded, think, answer, problem_type):
        consistency, reason = "inconsistent", ""
    elif same is None and concluded is not None:
        consistency, reason = "unknown", "other words: they may say the same"
    else:
        consistency, reason = "unknown", "no conclusion: the rules read none"
    return {"consistency": consistency, "concluded_answer": concluded, "reason": reason}


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
        record = {"name": self.name, "prompt_version": self.prompt_version, "requests": self.requests}
        return {**record, "retries": self.retries, "failures": dict(self.failures)}

    def summary(self) -> str:
        return f"Judged by {self.name}, asked {self.requests:,} times."


class RulesJudge(Judge):
    """The judge that needs no model."""

    name = "rules"

    async def __call__(self, item: dict) -> dict:
        return _verdict_by_rules(item["think"], item["answer"], item["problem_type"], item["options"])


class UserJudge(Judge):
    """A coroutine of the user's own, `async def judge(item) -> verdict`, as `Judge` has it; not cached."""

    def __init__(self, name: str, *, concurrency: int):
        """Raises ConfigError if `name`, as `module:function`, cannot be imported."""
        super().__init__()
        self.name, self.concurrency, self.judge = name, concurrency, user_function(name, setting="judge")

    async def __call__(self, item: dict) -> dict:
        self.requests += 1
        verdict = await self.judge(item)
        if (
            not isinstance(verdict, dict)
            or not _VERDICT <= verdict.keys()
            or verdict["consistency"] not in CONSISTENCIES
            or not isinstance(verdict["concluded_answer"], str | None)
            or not isinstance(verdict["reason"], str)
        ):
            raise JudgeError(
                f"judge {self.name}: expected a dict of texts, {', '.join(sorted(_VERDICT))}, its consistency one of "
                f"{', '.join(CONSISTENCIES)}; came {verdict!r:.200}."
            )
        return verdict
