"""Rollouts in, verdicts out: the checks and the judge over a stream of any length."""

import asyncio
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from veripo_trl.verifier.cache import VerdictCache
from veripo_trl.verifier.checks import check_rollouts
from veripo_trl.verifier.judge_prompts import MAX_ANSWER_CHARS, ReplyError, check_reply, judged_text, settle

BATCH = 16  # rollouts that are checked at once; a judge's server waits meanwhile, so not many
HIGH, LOW = 2, 1.5
MAX_OPEN = 8192  # rollouts read whose verdict was not yielded yet: one slow request holds up the order, not the rest


def verify_stream(
    rollouts: Iterable[dict], *, judge, tokenizer, cache: VerdictCache | None = None, ngram: int = 10, progress=None,
    regression_score: str = "mean_relative_accuracy",
) -> Iterator[dict]:  # fmt: skip
    """Verify rollouts, lazily. Not from within a coroutine: the event loop of the judge's requests runs in here.

    Args:
        rollouts: dicts as `RolloutStore` reads them.
        judge: see `judges.Judge`.
        tokenizer, ngram, regression_score: of `check_rollouts`.
        cache: of the judge's replies; not used by a judge that does not cache. Equal texts in the stream are judged once.
        progress: a tqdm bar, updated with each verdict.

    Yields:
        One verdict per rollout, in input order: `rollout_id, question_id, format_ok, accuracy, concluded_answer,
        consistency ("consistent", "inconsistent", "unknown"), repetition, think_tokens, judge, prompt_version, reason`.
        Why a verdict is unknown is said in `reason`, up to a colon.

    Raises:
        JudgeError: the judge cannot go on; what it had said is in the cache. SolutionError: an unreadable truth.
    """
    loop, rollouts = asyncio.new_event_loop(), iter(rollouts)
    asking = _Asking(judge, cache)
    batches = iter(lambda: list(itertools.islice(rollouts, BATCH)), [])
    try:
        for batch in itertools.chain(batches, [[]]):  # the empty one: no more to read
            checks = check_rollouts(batch, tokenizer=tokenizer, ngram=ngram, regression_score=regression_score)
            for rollout, check in zip(batch, checks, strict=True):
                asking.open(loop.create_task(asking.verdict(rollout, check)))
            loop.run_until_complete(asking.room(2 * judge.concurrency if batch else 0))
            while asking.tasks and asking.tasks[0].done():
                if progress is not None:
                    progress.update()
                yield asking.tasks.popleft().result()
    finally:
        loop.run_until_complete(asking.end())
        loop.close()


class _Asking:
    """From checked rollouts to verdicts; asks the judge what the cache does not know, each text once."""

    def __init__(self, judge, cache: VerdictCache | None):
        self.judge, self.cache = judge, cache
        self.slots = asyncio.Semaphore(judge.concurrency)
        self.tasks: deque[asyncio.Task] = deque()  # in input order, from the first whose verdict was not yielded
        self.unfinished, self.error, self.changed = 0, None, asyncio.Event()
        self.asked: dict[bytes, asyncio.Future] = {}  # what is being asked, for others with the same text

    def open(self, task: asyncio.Task) -> None:
        self.tasks.append(task)
        self.unfinished += 1
        task.add_done_callback(self.note)

    def note(self, task: asyncio.Task) -> None:
        self.unfinished -= 1
        error = None if task.cancelled() else task.exception()  # asked of every task, or asyncio reports it too
        self.error = self.error or error
        self.changed.set()

    async def room(self, at_most: int) -> None:
        """Wait until at most so many are unfinished; not for all: requests are to be sent while rollouts are checked."""
        while self.unfinished > at_most or (len(self.tasks) > MAX_OPEN and not self.tasks[0].done()):
            self.changed.clear()
            await self.changed.wait()
            if self.error is not None:  # of any task: the first in the order may be waiting
                raise self.error

    async def end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.judge.close()

    async def verdict(self, rollout: dict, check: dict) -> dict:
        think, answer = check["think"], check["answer"]
        if not think or not answer:
            # Never shown to a judge: there is nothing that it could compare.
            judged = _unknown("no spans: not one readable think and answer span")
        elif len(answer) > MAX_ANSWER_CHARS:
            judged = _unknown(f"long answer: {len(answer)} characters")
        else:
            item = {"think": think, "answer": answer} | {key: rollout[key] for key in ("problem_type", "options")}
            judged = await (self.once(item) if self.judge.caches else self.ask(item))
        return {
            "rollout_id": rollout["rollout_id"],
            "question_id": rollout["question_id"],
            "format_ok": check["format_ok"],
            "accuracy": check["accuracy"],
            "concluded_answer": judged["concluded_answer"],
            "consistency": judged["consistency"],
            "repetition": check["repetition"],
            "think_tokens": check["think_tokens"],
            "judge": self.judge.name,
            "prompt_version": self.judge.prompt_version,
            "reason": judged["reason"],
        }

    async def ask(self, item: dict) -> dict:
        async with self.slots:
            return await self.judge(item)

    async def once(self, item: dict) -> dict:
        """`ask`, unless the cache knows, or the same text is being asked."""
        judge = self.judge
        key = VerdictCache.key(
            judge.name, judge.prompt_version, judged_text(item, max_think_chars=judge.max_think_chars)
        )
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
        reply = None if self.cache is None else self.cache.get(key)
        try:
            return None if reply is None else check_reply(reply)
        except ReplyError:
            return None


def _unknown(reason: str) -> dict:
    return {"consistency": "unknown", "concluded_answer": None, "reason": reason}
