"""Maths: whether two expressions are equal, by math-verify.

An answer over 256 characters is wrong rather than cut, since its end could take back its beginning.
"""

import re

from veripo_trl.answers.math_process import FUNCTIONS, MAX_MATH_CHARS, calculate, to_latex
from veripo_trl.answers.numbers import number_tokens
from veripo_trl.answers.plain import HEDGE, plain, stated


def math_text(text: str) -> str:
    """An answer as math-verify is to read it. Bare expressions are put between dollars, without which its LaTeX reader
    ignores them; prose must contain one number, or it would pick the last of several ("" then, which it cannot read)."""
    text = text.translate({0x2212: "-", 0x2044: "/"}).strip()
    if not re.search(r"\$|\\\(|\\\[|\\boxed", text):
        text = stated(text).rstrip(".")
        bare = re.sub(r"\\[a-zA-Z]+(?:\{[a-zA-Z ]*\})?", " ", text)
        if not re.search(rf"\b(?!(?:{FUNCTIONS})\b)[A-Za-z]{{3,}}", bare):
            text = f"${to_latex(text)}$"
        elif len(number_tokens(text)) > 1:
            return ""
    return text


def same_math(answer: str, truth: str) -> bool:
    answer, truth = answer.strip(), truth.strip()
    if not answer or max(len(answer), len(truth)) > MAX_MATH_CHARS:
        return False
    if plain(answer) == plain(truth):
        return True
    if HEDGE.search(answer) and not HEDGE.search(truth):
        return False
    return calculate("is_same", math_text(truth), math_text(answer)) is True
