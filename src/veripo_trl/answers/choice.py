"""Choices: the set of letters that a text answers with.

It must equal the truth's set. An answer that names another option as well (another letter, another option's text beside
the letter), a hedge or a negation is no clear answer.
"""

import functools
import re
from collections.abc import Sequence

from veripo_trl.answers.plain import HEDGE, MAX_CHARS, TAKEN_BACK, stated, unexplained, without_rejected, words_of
from veripo_trl.errors import SolutionError


@functools.lru_cache(maxsize=4096)
def _labels(options: tuple[str, ...]) -> dict[str, str]:
    split = [re.fullmatch(r"\s*[(\[]?([A-Za-z])[)\].:]+\s*(.*)", option, re.S) for option in options]
    letters = [match[1].upper() for match in split if match]
    if len(letters) == len(options) == len(set(letters)):
        return {match[1].upper(): words_of(match[2]) for match in split}
    return {chr(ord("A") + i): words_of(option) for i, option in enumerate(options)}


def option_labels(options: Sequence[str] | None) -> dict[str, str]:
    """{letter: text in comparable form} of options such as "A. red", "(B) green"; letters by position if they have
    none; {} without options."""
    return _labels(tuple(options or ()))


def _letter(text: str, labels: dict[str, str]) -> str | None:
    """The letter that `text` consists of, brackets and punctuation aside."""
    text = text.strip(" \t\n.,;:!\"'()[]{}<>-•").upper()
    known = text in labels if labels else len(text) == 1 and "A" <= text <= "Z"
    return text if known else None


def leading_option(text: str, labels: dict[str, str]) -> tuple[str | None, str]:
    """(letter of the longest option text that `text` begins with or None, the words after it)."""
    words = words_of(text)
    found = [
        letter
        for letter, option in labels.items()
        if option and words.startswith(option) and not words[len(option) : len(option) + 1].isalnum()
    ]
    if not found:
        return None, words
    longest = max(found, key=lambda letter: len(labels[letter]))
    return longest, words[len(labels[longest]) :]


def other_letters(text: str, labels: dict[str, str]) -> set[str]:
    """Capital option letters that stand alone in `text`; the article "A" and the pronoun "I" are not letters."""
    known = labels or "ABCDEFGHIJ"
    standing = re.finditer(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI]) [a-z])", text)
    return {match[1] for match in standing if match[1] in known}


def _single_choice(text: str, labels: dict[str, str]) -> str | None:
    """The letter of "B", "left", "B. left", "B (left)" or "left (B)"; None for anything more or contradictory."""
    if letter := _letter(text, labels):
        return letter
    words = words_of(text)
    same_text = [letter for letter, option in labels.items() if option and option == words]
    if same_text:
        return same_text[0] if len(same_text) == 1 else None
    for pattern, letter_group, text_group in (
        (r"[(\[]?([A-Za-z])(?:\s*[.):\],-]+\s*|\s+)(.+)", 1, 2),
        (r"(.+?)\s*[(\[]([A-Za-z])[)\]]\W*", 2, 1),
    ):
        match = re.fullmatch(pattern, text, re.S)
        if match:
            letter = match[letter_group].upper()
            if labels.get(letter) and labels[letter] == words_of(match[text_group]):
                return letter
    return None


def _letter_and_prose(text: str, labels: dict[str, str]) -> str | None:
    """The letter of "B. because …" or "B is correct" if the prose names no other option."""
    match = re.match(r"[(\[]?([A-Za-z])(?:[.):\],]+\s|\s*\n|\s+[(–—-]|\s+(?=because|since|as\b|"
                     r"is (?:the )?(?:correct|right|best|answer)))", text)  # fmt: skip
    letter = match and _letter(match[1], labels)
    if not letter:
        return None
    prose = text[match.end() :]
    leading, rest = leading_option(prose, labels)
    if leading not in (None, letter) or re.match(r"\W*(?:or|and|and/or|/|actually|no|rather)(?!\w)", rest):
        return None
    if re.search(TAKEN_BACK, rest) or other_letters(prose, labels) - {letter}:
        return None
    if len(rest.split()) <= 3 and not HEDGE.search(rest):  # "B. green (blue)"
        others = (option for other, option in labels.items() if option and other != letter)
        if any(re.search(rf"(?<!\w){re.escape(option)}(?!\w)", rest) for option in others):
            return None
    return letter


def _choice_set(text: str, labels: dict[str, str]) -> frozenset[str] | None:
    if letter := _single_choice(text, labels):
        return frozenset(letter)
    joined = text.strip(" .()[]")
    if joined.isalpha() and joined.isupper() and list(joined) == sorted(set(joined)):
        if all(_letter(character, labels) for character in joined):
            return frozenset(joined)
    parts = re.split(r"\s*(?:[,;&\n]|\band\b)\s*", re.sub(r"^both\s+|^\(|\)$", "", text, flags=re.I))
    letters = [_single_choice(part, labels) for part in parts if part]
    if letters and None not in letters:
        return frozenset(letters)
    if letter := _letter_and_prose(text, labels):
        return frozenset(letter)
    return None


def read_choice(text: str, options: Sequence[str] | None) -> frozenset[str] | None:
    """The letters that `text` answers with; None if there is no clear answer. Without options, letters A to Z."""
    if len(text) > MAX_CHARS:
        return None
    labels, text = option_labels(options), unexplained(text)
    for reading in (text, stated(text)):
        letters = _choice_set(reading, labels) or _choice_set(without_rejected(reading, _other_option(labels)), labels)
        if letters:
            return letters
    return None


def _other_option(labels: dict[str, str]) -> str:
    """A pattern for "A", "A or (C)", "red"."""
    letter = r"[(\[]?[A-Z][)\]]?"
    texts = "".join("|" + re.escape(option) for option in labels.values() if option)
    return rf"{letter}(?:\s*(?:,|/|or|and|nor)\s*{letter})*(?!\w)(?-i:(?!\s(?!but )[a-z])){texts}"


def true_choice(solution: str, options: Sequence[str] | None) -> frozenset[str]:
    tokens = [token for token in re.split(r"(?:[\s,;&()\[\].]|\band\b)+", solution) if token]
    if len(tokens) == 1 and tokens[0].isupper() and list(tokens[0]) == sorted(tokens[0]):
        tokens = list(tokens[0])  # "AC"
    letters, labels = frozenset(token.upper() for token in tokens), option_labels(options)
    if not tokens or len(letters) != len(tokens) or not all(re.fullmatch("[A-Z]", letter) for letter in letters):
        raise SolutionError(f"solution {solution!r} of a multiple-choice row: expected letters such as 'B' or 'A,C'")
    if labels and not letters <= labels.keys():
        raise SolutionError(
            f"solution {solution!r} is not among the options' letters {', '.join(labels)}; correct the solution or "
            "the options"
        )
    return letters


def partial_credit(letters: frozenset[str], truth: frozenset[str]) -> float:
    """The share of the right letters that are named, 0 as soon as a wrong one is (TW-GRPO, arXiv 2505.24718)."""
    return len(letters) / len(truth) if letters <= truth else 0.0
