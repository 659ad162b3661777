"""The curriculum between iterations: most of the questions that the policy has solved are chosen to be dropped
(recipe/training_rows.py leaves them out).

VerIPO discards 80% of the simple examples, those whose rollouts' mean accuracy is 1.
"""

from collections.abc import Hashable, Iterable

from veripo_trl.verifier.pairs import seeded_order

_TOLERANCE = 1e-9


def choose_solved(
    accuracies: Iterable[tuple[str, Hashable, float]], *, share: float = 0.8, seed: int = 0
) -> dict[str, list | int | float | None]:
    """Which solved questions the next iteration leaves out; the same for every order of the rollouts.

    Args:
        accuracies: (question id, which generation, accuracy) of every rollout.
        share: of the solved questions, in [0, 1].

    Returns:
        `dropped`: ids, sorted; `kept`: solved questions that stay; `solved` (every rollout of accuracy 1), `unsolved`
        (none above 0), `mixed`: questions; `zero_variance`: share of the groups (a question in one generation, of two
        rollouts or more) whose accuracies are all equal, so that accuracy gave GRPO nothing to learn there; None
        without such groups; `groups`; `share`, `seed`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"drop_solved_share: expected a share from 0 to 1, got {share!r}.")
    questions: dict[str, tuple[float, float]] = {}  # (least, greatest) accuracy
    groups: dict[tuple, tuple[int, float, float]] = {}
    for question, generation, accuracy in accuracies:
        low, high = questions.get(question, (accuracy, accuracy))
        questions[question] = min(low, accuracy), max(high, accuracy)
        count, low, high = groups.get((question, generation), (0, accuracy, accuracy))
        groups[question, generation] = count + 1, min(low, accuracy), max(high, accuracy)
    solved = [question for question, (low, _) in questions.items() if low >= 1 - _TOLERANCE]
    unsolved = sum(high <= _TOLERANCE for _, high in questions.values())
    solved.sort(key=lambda question: (seeded_order(seed, "solved", question), question))
    dropped = solved[: int(share * len(solved) + 0.5)]
    several = [(low, high) for count, low, high in groups.values() if count > 1]
    flat = sum(high - low <= _TOLERANCE for low, high in several)
    return {
        "dropped": sorted(dropped),
        "kept": len(solved) - len(dropped),
        "solved": len(solved),
        "mixed": len(questions) - len(solved) - unsolved,
        "unsolved": unsolved,
        "zero_variance": flat / len(several) if several else None,
        "groups": len(several),
        "share": share,
        "seed": seed,
    }
