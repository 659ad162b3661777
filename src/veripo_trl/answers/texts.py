"""Texts: word error rate (OCR) and ROUGE (free-form)."""

import functools
import re

from veripo_trl.answers.plain import words_of

MAX_FREE_FORM_CHARS = 20_000  # ROUGE-L is quadratic
_FILLERS = {"and", "then", "the", "a", "an"}  # "red, then blue" says what "red blue" says


def one_minus_word_error_rate(answer: str, truth: str) -> float:
    """max(0, 1 - edits / words of the truth) over white-space words, case as written."""
    words, true_words = answer.split(), truth.split()
    if len(words) >= 2 * len(true_words):
        return 0.0  # at least as many insertions as the truth has words
    row = list(range(len(true_words) + 1))
    for i, word in enumerate(words, 1):
        diagonal, row[0] = row[0], i
        for j, true_word in enumerate(true_words, 1):
            edits = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != true_word))
            diagonal, row[j] = row[j], edits
    return max(0.0, 1.0 - row[-1] / len(true_words))


@functools.cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(answer: str, truth: str) -> float:
    """Mean of the F1 of ROUGE-1, -2 and -L. ROUGE reads [a-z0-9] only, and a single word has no bigram: equal words
    score 1 whatever it says."""
    if len(answer) > MAX_FREE_FORM_CHARS:
        return 0.0
    if words_of(answer) == words_of(truth):
        return 1.0
    return sum(score.fmeasure for score in _rouge_scorer().score(truth, answer).values()) / 3


def rouge_metrics(answer: str | None, truth: str) -> dict[str, float]:
    return {"ROUGE": 0.0 if answer is None else rouge(answer, truth)}


def same_words(a: str, b: str) -> bool:
    first, second = ([w for w in re.findall(r"\w+", words_of(text)) if w not in _FILLERS] for text in (a, b))
    return bool(first) and first == second
