"""Rollouts in, verdicts out: the checks and the judge over a stream of any length."""

from collections import deque
from collections.abc import Iterable, Iterator

from .cache import VerdictCache
from .checks import check_rollouts
from .judge_prompts import MAX_ANSWER_CHARS, ReplyError, check_reply, judged_text, settle

BATCH = 64  # rollouts that are checked at once; a judge's server waits meanwhile, so not many
MAX_OPEN = 8192  # rollouts read whose verdict was not yielded yet: one slow request holds up the order, not the rest


def verify_stream(
    rollouts: Iterable[dict], *, judge, tokenizer, cache: VerdictCache | None = None, ngram: int = 10, progress=None,
    regression_score: str = "mean_relative_accuracy",
) -> Iterator[dict]:  # fmt: skip
    """Verify rollouts, lazily.

    Args:
        rollouts: dicts as `RolloutStore` reads them.
        judge: `RulesJudge`, `ServerJudge` or `LocalJudge`.
        tokenizer, ngram, regression_score: of `check_rollouts`.
        cache: of the judge's replies; not used by `RulesJudge`. Equal texts in the stream are judged once.
        progress: a tqdm bar, updated with each verdict.

    Yields:
        One verdict per rollout, in input order: `rollout_id, question_id, format_ok, accuracy, concluded_answer,
        consistency ("consistent", "inconsistent", "unknown"), repetition, think_tokens, judge, prompt_version, reason`.
        Why a verdict is unknown is said in `reason`, up to a colon.

    Raises:
        JudgeError: the judge cannot go on; what it had said is in the cache. SolutionError: an unreadable truth.
    """
    stream = _Stream(judge, cache)
    asked = stream.items(rollouts, tokenizer=tokenizer, ngram=ngram, regression_score=regression_score)
    replies = judge.judge_stream(asked)
    try:
        for place, verdict in replies:
            if place is not None:
                stream.take(place, verdict)
            yield from stream.ready(progress)
        yield from stream.ready(progress)
    finally:
        replies.close()


class _Stream:
    """What is between reading and yielding."""

    def __init__(self, judge, cache: VerdictCache | None):
        self.judge, self.cache = judge, cache if judge.caches else None
        self.open: deque[dict] = deque()  # verdicts in input order; `consistency` is None until judged
        self.waiting: dict[int, tuple] = {}  # place: (key, item, verdict) of what the judge was asked
        self.same: dict[bytes, list[tuple]] = {}  # key: (item, verdict) of the same text, while it is asked
        self.places = 0

    def items(self, rollouts: Iterable[dict], **options) -> Iterator[dict | None]:
        """What the judge is to be asked; None whenever verdicts can go out or enough are open."""
        batch = []
        for rollout in rollouts:
            batch.append(rollout)
            if len(batch) == BATCH:
                yield from self.open_batch(batch, **options)
                batch = []
                # Once is not enough: a None is answered by one verdict, which need not be the one that is due.
                while self.open and (self.open[0]["consistency"] is not None or len(self.open) > MAX_OPEN - BATCH):
                    yield None
        yield from self.open_batch(batch, **options)

    def open_batch(self, rollouts: list[dict], **options) -> Iterator[dict]:
        for rollout, check in zip(rollouts, check_rollouts(rollouts, **options), strict=True):
            think, answer = check.pop("think"), check.pop("answer")
            verdict = {
                "rollout_id": rollout["rollout_id"],
                "question_id": rollout["question_id"],
                "format_ok": check["format_ok"],
                "accuracy": check["accuracy"],
                "concluded_answer": None,
                "consistency": None,
                "repetition": check["repetition"],
                "think_tokens": check["think_tokens"],
                "judge": self.judge.name,
                "prompt_version": self.judge.prompt_version,
                "reason": "",
            }
            self.open.append(verdict)
            if not think or not answer:
                # Never shown to a judge: there is nothing that it could compare.
                verdict |= {"consistency": "unknown", "reason": "no spans: not one readable think and answer span"}
            elif len(answer) > MAX_ANSWER_CHARS:
                verdict |= {"consistency": "unknown", "reason": f"long answer: {len(answer)} characters"}
            else:
                item = {"think": think, "answer": answer} | {key: rollout[key] for key in ("problem_type", "options")}
                yield from self.ask(item, verdict)

    def ask(self, item: dict, verdict: dict) -> Iterator[dict]:
        """Nothing if the cache knows, or if the same text is being asked."""
        key = None
        if self.judge.caches:
            text = judged_text(item, max_think_chars=self.judge.max_think_chars)
            key = VerdictCache.key(self.judge.name, self.judge.prompt_version, text)
            if (reply := self.cached(key)) is not None:
                verdict |= settle(reply, item)
                return
            if key in self.same:
                self.same[key].append((item, verdict))
                return
            self.same[key] = []
        place, self.places = self.places, self.places + 1
        self.waiting[place] = (key, verdict)
        yield {"place": place, **item}

    def cached(self, key: bytes) -> dict | None:
        """A reply of the cache that is still a reply; any other is asked for anew, and replaced."""
        reply = None if self.cache is None else self.cache.get(key)
        try:
            return None if reply is None else check_reply(reply)
        except ReplyError:
            return None

    def take(self, place: int, judged: dict) -> None:
        key, verdict = self.waiting.pop(place)
        reply = judged.pop("reply")
        verdict |= judged
        if self.cache is not None and reply is not None:
            self.cache.put(key, reply, judge=self.judge.name, prompt_version=self.judge.prompt_version)
        for item, other in self.same.pop(key, ()):
            # Two rows may ask the same text under different problem types.
            other |= judged if reply is None else settle(reply, item)

    def ready(self, progress) -> Iterator[dict]:
        while self.open and self.open[0]["consistency"] is not None:
            verdict = self.open.popleft()
            if progress is not None:
                progress.update()
            yield verdict
