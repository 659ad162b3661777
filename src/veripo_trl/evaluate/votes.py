"""Of several answers to a question, the one that counts: by majority, or as the verifier elects."""

from veripo_trl.answers.score import (
    answers_match,
    extract_answer,
    is_well_formed,
    read_answer,
    split_completion,
)
from veripo_trl.verifier.checks import repetition_share
from veripo_trl.verifier.pairs import PairOptions

_RANKS = {"consistent": 2, "unknown": 1, "inconsistent": 0}


def majority(completions: list[str], *, problem_type: str, options=None) -> int:
    """The index of the first completion that gives the most frequent answer.

    Answers are the same where `answers_match` says so, each compared with the first of those before it.
    What cannot be read has no vote; of answers with as many votes that wins which came first; without a
    vote the first completion stands.
    """
    task, groups = {"problem_type": problem_type, "options": options}, []
    answers = [extract_answer(completion) for completion in completions]
    for index, answer in enumerate(answers):
        if read_answer(answer, **task) is None:
            continue
        same = (group for group in groups if answers_match(answers[group[0]], answer, **task))
        if (group := next(same, None)) is None:
            groups.append([index])
        else:
            group.append(index)
    return max(groups, key=len)[0] if groups else 0  # the first of the largest


def elected(completions: list[str], verdicts: list[str], *, problem_type: str, options=None) -> int:
    """The index of the completion that the verifier elects: the `majority` among the best ones.

    Those are the consistent ones; without any the unknown ones; else all. One that is not well formed, or
    too repetitive for a pair, is as an inconsistent one; one without a readable answer is behind all.

    Args:
        verdicts: a judge's on each.
    """
    ranks = []
    for completion, verdict in zip(completions, verdicts, strict=True):
        think, answer = split_completion(completion)
        good = is_well_formed(completion) and repetition_share(think) <= PairOptions.max_repetition
        readable = read_answer(answer, problem_type=problem_type, options=options) is not None
        ranks.append((_RANKS[verdict] if good else 0) if readable else -1)
    best = [index for index, rank in enumerate(ranks) if rank == max(ranks)]
    return best[
        majority([completions[index] for index in best], problem_type=problem_type, options=options)
    ]
