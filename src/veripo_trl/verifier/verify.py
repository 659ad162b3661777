"""Rollouts in, verdicts out: the checks and the judge over a stream of any length."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from veripo_trl.answers.rewards import accuracy_reward
from veripo_trl.verifier.checks import check_rollouts
from veripo_trl.verifier.judge_prompts import (
    MAX_ANSWER_CHARS,
    ReplyError,
    check_reply,
    judged_text,
    settle,
)
from veripo_trl.verifier.judges import verdict
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
    slots = asyncio.Semaphore(judge.concurrency)
    asked: dict[bytes, asyncio.Task] = {}  # what is being asked, for others with the same text
    # In input order, from the first whose verdict was not yielded.
    tasks: deque[asyncio.Task] = deque()
    unfinished: set[asyncio.Task] = set()

    async def ask(item: dict, key: bytes | None = None) -> dict:
        async with slots:
            judged = await judge(item)
        if key and cache is not None and judged["reply"] is not None:
            cache.put(key, judged["reply"], judge=judge.name, prompt_version=judge.prompt_version)
        return judged

    async def judged(item: dict) -> dict:
        """`ask`, unless the cache knows, or the same text is being asked."""
        if not judge.caches:
            return await ask(item)
        key = VerdictCache.key(judge.name, judge.prompt_version, judged_text(item))
        try:
            reply = check_reply(None if cache is None else cache.get(key))
        except ReplyError:  # none, or no longer a reply: asked for anew, and replaced
            if key not in asked:
                asked[key] = loop.create_task(ask(item, key))
                # Its error is the waiting ones': asked for here too, or asyncio reports it where those are cancelled.
                asked[key].add_done_callback(
                    lambda task: asked.pop(key) and task.cancelled() or task.exception()
                )
            said = await asked[key]
            if (reply := said["reply"]) is None:
                return said
        return settle(reply, item)  # two rows may ask the same text under different problem types

    async def verify(rollout: dict, check: dict) -> dict:
        think, answer = check.pop("think"), check.pop("answer")
        if not think or not answer:
            # Never shown to a judge: there is nothing that it could compare.
            said = verdict("unknown", None, "no spans: not one readable think and answer span")
        elif len(answer) > MAX_ANSWER_CHARS:
            said = verdict("unknown", None, f"long answer: {len(answer)} characters")
        else:
            task = {key: rollout[key] for key in ("problem_type", "options")}
            said = await judged({"think": think, "answer": answer, **task})
        return {
            "rollout_id": rollout["rollout_id"],
            "question_id": rollout["question_id"],
            **check,
            **{key: said[key] for key in ("consistency", "concluded_answer", "reason")},
            "judge": judge.name,
            "prompt_version": judge.prompt_version,
        }

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
        # Asks each for its error, or asyncio reports it too.
        await asyncio.gather(*tasks, return_exceptions=True)
        await judge.close()

    batches = iter(lambda: list(itertools.islice(rollouts, BATCH)), [])
    try:
        for batch in itertools.chain(batches, [[]]):  # the empty one: no more to read
            checks = check_rollouts(batch, tokenizer=tokenizer, ngram=ngram, reward=reward)
            for rollout, check in zip(batch, checks, strict=True):
                tasks.append(loop.create_task(verify(rollout, check)))
                unfinished.add(tasks[-1])
            loop.run_until_complete(wait(2 * judge.concurrency if batch else 0))
            while tasks and tasks[0].done():
                yield tasks.popleft().result()
    finally:
        loop.run_until_complete(end())
        loop.close()
