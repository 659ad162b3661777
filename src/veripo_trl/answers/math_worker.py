"""The process in which maths is parsed and compared; math_process.py starts it as a script and sends it calls.

A time limit that is an exception can be lost in a library's destructor or bare `except`, and waits for long integer
arithmetic to end. Here the kernel ends the process (SIGPROF's default action), after a limit in processor time. What
calculates is a fork that has the libraries loaded already, so that taking its place is a matter of milliseconds.

A call is a line `[number, name, arguments, limit_s]`; its reply is `[number, result]`, or `[null, signal]` from the
parent of a process that was ended by one.
"""

import sys

if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this folder: our modules' names are not the libraries'

import functools  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import warnings  # noqa: E402

MAX_MEMORY_BYTES = 4 << 30


def _parse(text: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse

    found = [StringExtractionConfig(), LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(text, extraction_config=found, fallback_mode="no_fallback", parsing_timeout=None)


_parse_truth = functools.lru_cache(maxsize=1024)(_parse)


def is_same(truth: str, answer: str) -> bool:
    from math_verify import verify

    return bool(verify(_parse_truth(truth), _parse(answer), timeout_seconds=None))


def is_maths(text: str) -> bool:
    is_same(text, "$1.5$")  # 9^9^9^9 is parsed, but cannot be compared within any limit
    return bool(_parse_truth(text))


def value(text: str) -> float | None:
    """The finite real number that an expression is, or None."""
    for expression in _parse(text):
        if getattr(expression, "is_number", False):
            number = expression.evalf()
            return float(number) if number.is_real and number.is_finite else None
    return None


def released(output: str, truth: str) -> bool:
    """As the released script calls math-verify: its order of arguments, its own limits (alarms, 5 s each)."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    found = [StringExtractionConfig(), LatexExtractionConfig(), ExprExtractionConfig()]
    return bool(verify(parse(output, extraction_config=found), parse(f"${truth}$")))


CALLS = {call.__name__: call for call in (is_maths, is_same, value, released)}


def _serve(calls, replies) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    for line in calls:
        number, name, arguments, limit_s = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            result = CALLS[name](*arguments)
        except Exception:  # an answer that the libraries stumble over is a wrong one
            result = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps([number, result]).encode() + b"\n")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; this ends with its parent
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no reply
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if not is_same("$\\frac{1}{2}$", "$0.5$") or is_same("$x^2+1$", "$(1,2)$") or value("$3^2$") != 9:
        sys.exit("math-verify does not compare as expected: is it the version that the package asks for?")
    while True:
        child = os.fork()
        if child == 0:
            _serve(sys.stdin.buffer, replies)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            return  # nobody calls any more
        replies.write(b"[null, %d]\n" % os.WTERMSIG(status))


if __name__ == "__main__":
    main()
