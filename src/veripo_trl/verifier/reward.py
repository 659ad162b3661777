"""Consistency as a reward: the verifier's verdict as a column of GRPO, what the pairs teach by DPO otherwise.

The judge that rewards is not the judge that reports: a policy learns what its judge overlooks.
"""

from collections import Counter
from collections.abc import Callable

from veripo_trl.answers.rewards import completion_text
from veripo_trl.errors import ConfigError
from veripo_trl.user_functions import is_user_function
from veripo_trl.verifier.judge_prompts import load_judge_prompt
from veripo_trl.verifier.judges import Judge, JudgeError, RulesJudge, UserJudge
from veripo_trl.verifier.server_judge import ServerJudge
from veripo_trl.verifier.verify import NOT_ASKED, judge_stream, judged_item

_REFUSED = ("HTTP 400", "HTTP 413", "HTTP 422")  # one text, a too long one for instance, by a server that answers others
VALUES = {"consistent": 1.0, "unknown": 0.0, "inconsistent": -1.0, "failed": None}
_FAILED = ("no connection", "connection", "time-out", "HTTP", "not a chat completion")  # how a dead judge's reasons begin


def consistency(judge: str = "rules", prompt: str = "consistency", **server) -> Callable[..., list[float]]:
    """The reward function: 1 for a consistent completion, 0 for unknown, -1 for an inconsistent one, None (which TRL
    leaves out) where a server's request failed.

    The completions of a step are judged at once, equal ones once; the shares of unknown verdicts and of failed requests
    are logged as `consistency/unknown` and `consistency/failed`.

    Args:
        judge: rules, server, or a coroutine of the user's own as `module:function` (of it, `concurrency` at once).
        prompt: what a server is asked: a file of `verifier_prompts/` by its name, or a path.
        server: `url`, `model`, and what else `ServerJudge` takes.

    Raises:
        JudgeError: by the reward, when no request of a step was answered: a dead judge is no unknown verdict.
    """
    asked = _judge(judge, prompt, server)

    def consistency_reward(completions, problem_type, options=None, log_metric=None, **kwargs) -> list[float | None]:
        options = options if options is not None else [None] * len(completions)
        options = [tuple(some or ()) for some in options]  # hashed below
        rows = list(zip(map(completion_text, completions), problem_type, options, strict=True))
        distinct = list(dict.fromkeys(rows))
        items = [judged_item(text, problem_type=kind, options=some) for text, kind, some in distinct]
        said = dict(zip(distinct, judge_stream(items, judge=asked), strict=True))
        _refuse_dead(asked, said.values())
        found = [_found(asked, said[row]) for row in rows]
        if log_metric:
            for each in ("unknown", "failed"):
                log_metric(f"consistency/{each}", Counter(found)[each] / max(1, len(found)))
        return [VALUES[each] for each in found]

    return consistency_reward


def _judge(judge: str, prompt: str, server: dict) -> Judge:
    if judge == "rules" and not server:
        return RulesJudge()
    if judge == "server" and {"url", "model"} <= server.keys():
        return ServerJudge(prompt=load_judge_prompt(prompt), **server)
    if is_user_function(judge) and server.keys() <= {"concurrency"}:
        return UserJudge(judge, concurrency=server.get("concurrency", 64))
    raise ConfigError(
        "consistency: expected judge: rules, judge: server with url and model, or judge: module:function; came "
        f"judge: {judge} with {', '.join(sorted(server)) or 'nothing'}."
    )


def _found(judge: Judge, verdict: dict) -> str:
    return "failed" if judge.caches and verdict["reason"].startswith(_FAILED) else verdict["consistency"]


def _refuse_dead(judge: Judge, said) -> None:
    reasons = [each["reason"] for each in said if judge.caches and not each["reason"].startswith(NOT_ASKED)]
    dead = [reason.startswith(_FAILED) and not reason.startswith(_REFUSED) for reason in reasons]
    if reasons and all(dead):
        raise JudgeError(
            f"consistency: {judge.name} answered none of a step's {len(reasons)} requests; the last failed with "
            f"{reasons[-1]}. Start it again, then the same command: the run goes on from its last checkpoint."
        )
