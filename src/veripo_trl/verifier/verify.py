"""Rollouts in, verdicts out: the checks and the judge over a stream of any length."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from veripo_trl.answers.rewards import accuracy_reward
from veripo_trl.answers.score import split_completion
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

NOT_ASKED = ("no spans", "long answer")  # how the reasons begin of what no judge was shown


def verify_stream(
    rollouts: Iterable[dict],
    *,
    judge,
    tokenizer,
    cache: VerdictCache | None = None,
    reward: Callable = accuracy_reward,
) -> Iterator[dict]:
    """Verify rollouts, lazily. Not from within a coroutine: the event loop of the judge's requests runs in here.

    Args:
        rollouts: dicts as `RolloutStore` reads them.
        judge, cache: of `judge_stream`. tokenizer, reward: of `check_rollouts`.

    Yields:
        One verdict per rollout, in input order: `rollout_id, question_id, format_ok, accuracy, concluded_answer,
        consistency ("consistent", "inconsistent", "unknown"), repetition, think_tokens, judge, prompt_version, reason`.
        Why a verdict is unknown is said in `reason`, up to a colon.

    Raises:
        JudgeError: the judge cannot go on; what it had said is in the cache. SolutionError: an unreadable truth.
    """
    rollouts, checked = iter(rollouts), deque()  # those whose verdict was not yielded yet

    def items() -> Iterator[dict]:
        while batch := list(itertools.islice(rollouts, BATCH)):
            checks = check_rollouts(batch, tokenizer=tokenizer, reward=reward)
            for rollout, check in zip(batch, checks, strict=True):
                task = {key: rollout[key] for key in ("problem_type", "options")}
                spans = {key: check.pop(key) for key in ("think", "answer")}
                checked.append((rollout, check))
                yield spans | task

    for said in judge_stream(items(), judge=judge, cache=cache):
        rollout, check = checked.popleft()
        yield {
            "rollout_id": rollout["rollout_id"],
            "question_id": rollout["question_id"],
            **check,
            **{key: said[key] for key in ("consistency", "concluded_answer", "reason")},
            "judge": judge.name,
            "prompt_version": judge.prompt_version,
        }


def judged_item(completion: str, *, problem_type: str, options=None) -> dict:
    """What a judge is shown of a completion; its spans are None where they cannot be read."""
    think, answer = split_completion(completion)
    return {"think": think, "answer": answer, "problem_type": problem_type, "options": options}


def judge_stream(items: Iterable[dict], *, judge, cache: VerdictCache | None = None) -> Iterator[dict]:
    """A judge's verdicts on items, lazily and in their order. Not from within a coroutine, as `verify_stream`.

    Args:
        items: see `judges.Judge`. One without thinking or answer is shown to no judge, and unknown.
        cache: of the judge's replies; not used by a judge that does not cache. Equal texts in the stream are judged once.

    Raises:
        JudgeError: the judge cannot go on; what it had said is in the cache.
    """
    loop, items = asyncio.new_event_loop(), iter(items)
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
        """`ask`, unless there is nothing to compare, the cache knows, or the same text is being asked."""
        if not item["think"] or not item["answer"]:
            return verdict("unknown", None, f"{NOT_ASKED[0]}: not one readable think and answer span")
        if len(item["answer"]) > MAX_ANSWER_CHARS:
            return verdict("unknown", None, f"{NOT_ASKED[1]}: {len(item['answer'])} characters")
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

    batches = iter(lambda: list(itertools.islice(items, BATCH)), [])
    try:
        for batch in itertools.chain(batches, [[]]):  # the empty one: no more to read
            for item in batch:
                tasks.append(loop.create_task(judged(item)))
                unfinished.add(tasks[-1])
            loop.run_until_complete(wait(2 * judge.concurrency if batch else 0))
            while tasks and tasks[0].done():
                yield tasks.popleft().result()
    finally:
        loop.run_until_complete(end())
        loop.close()
