"""Maths: whether two expressions are equal, by math-verify.

An answer over 256 characters is wrong rather than cut, since its end could take back its beginning.
"""

import re

from veripo_trl.answers.math_process import FUNCTIONS, MATH_LIMIT_S, MAX_MATH_CHARS, calculate, to_latex
from veripo_trl.answers.numbers import number_tokens
from veripo_trl.answers.plain import HEDGE, plain, stated
from veripo_trl.errors import SolutionError


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


def check_math(solution: str) -> None:
    if len(solution.strip()) > MAX_MATH_CHARS:
        raise SolutionError(f"solution has {len(solution)} characters; expected {MAX_MATH_CHARS} at most")
    if not calculate("is_maths", math_text(solution)):
        raise SolutionError(
            f"solution {solution!r} of a math row: math-verify cannot parse or compare it within {MATH_LIMIT_S:g} s; "
            "write a number or a LaTeX expression, or use the problem type free-form"
        )
