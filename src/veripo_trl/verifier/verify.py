"""Rollouts in, verdicts out: the checks and the judge over a stream of any length."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from veripo_trl.answers.rewards import accuracy_reward
from veripo_trl.verifier.checks import check_rollouts
from veripo_trl.verifier.judge_prompts import MAX_ANSWER_CHARS, ReplyError, check_reply, judged_text, settle
from veripo_trl.verifier.reply_cache import VerdictCache

BATCH = 16  # rollouts that are checked at once; a judge's server waits meanwhile, so not many
MAX_OPEN = 8192  # rollouts read whose verdict was not yielded yet: one slow request holds up the order, not the rest


def verify_stream(
    rollouts: Iterable[dict],
    *,
    judge,
    tokenizer,
    cache: VerdictCache | None = None,
    ngram: int = 10,
    reward: Callable = accuracy_reward,
) -> Iterator[dict]:
    """Verify rollouts, lazily. Not from within a coroutine: the event loop of the judge's requests runs in here.

    Args:
        rollouts: dicts as `RolloutStore` reads them.
        judge: see `judges.Judge`.
        tokenizer, ngram, reward: of `check_rollouts`.
        cache: of the judge's replies; not used by a judge that does not cache. Equal texts in the stream are judged once.

    Yields:
        One verdict per rollout, in input order: `rollout_id, question_id, format_ok, accuracy, concluded_answer,
        consistency ("consistent", "inconsistent", "unknown"), repetition, think_tokens, judge, prompt_version, reason`.
        Why a verdict is unknown is said in `reason`, up to a colon.

    Raises:
        JudgeError: the judge cannot go on; what it had said is in the cache. SolutionError: an unreadable truth.
    """
    loop, rollouts = asyncio.new_event_loop(), iter(rollouts)
    asking = _Asking(judge, cache)
    tasks: deque[asyncio.Task] = deque()  # in input order, from the first whose verdict was not yielded
    unfinished: set[asyncio.Task] = set()

    async def wait(at_most: int) -> None:
        # Not for all: requests are to be sent while rollouts are checked.
        while len(unfinished) > at_most or (len(tasks) > MAX_OPEN and not tasks[0].done()):
            done, _ = await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
            unfinished.difference_update(done)
            for task in done:
                task.result()  # raises the error of any: the first in the order may be waiting

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # asks each for its error, or asyncio reports it too
        await judge.close()

    batches = iter(lambda: list(itertools.islice(rollouts, BATCH)), [])
    try:
        for batch in itertools.chain(batches, [[]]):  # the empty one: no more to read
            checks = check_rollouts(batch, tokenizer=tokenizer, ngram=ngram, reward=reward)
            for rollout, check in zip(batch, checks, strict=True):
                tasks.append(loop.create_task(asking.verdict(rollout, check)))
                unfinished.add(tasks[-1])
            loop.run_until_complete(wait(2 * judge.concurrency if batch else 0))
            while tasks and tasks[0].done():
                yield tasks.popleft().result()
    finally:
        loop.run_until_complete(end())
        loop.close()


class _Asking:
    """From a checked rollout to its verdict; asks the judge what the cache does not know, each text once."""

    def __init__(self, judge, cache: VerdictCache | None):
        self.judge, self.cache = judge, cache
        self.slots = asyncio.Semaphore(judge.concurrency)
        self.asked: dict[bytes, asyncio.Future] = {}  # what is being asked, for others with the same text

    async def verdict(self, rollout: dict, check: dict) -> dict:
        think, answer = check.pop("think"), check.pop("answer")
        judged = {"consistency": "unknown", "concluded_answer": None}
        if not think or not answer:  # never shown to a judge: there is nothing that it could compare
            judged["reason"] = "no spans: not one readable think and answer span"
        elif len(answer) > MAX_ANSWER_CHARS:
            judged["reason"] = f"long answer: {len(answer)} characters"
        else:
            item = {"think": think, "answer": answer} | {key: rollout[key] for key in ("problem_type", "options")}
            judged = await (self.once(item) if self.judge.caches else self.ask(item))
        return {
            "rollout_id": rollout["rollout_id"],
            "question_id": rollout["question_id"],
            **check,
            **{key: judged[key] for key in ("consistency", "concluded_answer", "reason")},
            "judge": self.judge.name,
            "prompt_version": self.judge.prompt_version,
        }

    async def ask(self, item: dict) -> dict:
        async with self.slots:
            return await self.judge(item)

    async def once(self, item: dict) -> dict:
        """`ask`, unless the cache knows, or the same text is being asked."""
        judge = self.judge
        key = VerdictCache.key(judge.name, judge.prompt_version, judged_text(item))
        if (reply := self.cached(key)) is not None:
            return settle(reply, item)
        if key in self.asked:
            judged = await self.asked[key]
            # Two rows may ask the same text under different problem types.
            return judged if judged["reply"] is None else settle(judged["reply"], item)
        self.asked[key] = asyncio.get_running_loop().create_future()
        try:
            judged = await self.ask(item)
            if self.cache is not None and judged["reply"] is not None:
                self.cache.put(key, judged["reply"], judge=judge.name, prompt_version=judge.prompt_version)
            self.asked[key].set_result(judged)
            return judged
        finally:
            self.asked.pop(key).cancel()  # without effect if there is a result

    def cached(self, key: bytes) -> dict | None:
        """A reply of the cache that is still a reply; any other is asked for anew, and replaced."""
        try:
            return None if self.cache is None else check_reply(self.cache.get(key))
        except ReplyError:
            return None
