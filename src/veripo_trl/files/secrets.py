"""Secrets in settings and commands, by their names and by their shapes: what is recorded or printed has none."""

import re

# How names end that hold a secret: hub_token, --hf-token, OPENAI_API_KEY, apiKey; not eos_token, max_tokens, monkey.
_NAME = (
    r"(?<![a-z])(?<!\b(?:pad|eos|bos|unk)[_-])(?:(?:api|access|private|auth|hf|hub)?[_-]?(?:token|key)"
    r"|secret|password|passwd|passphrase|credentials?)"
)
_NAMED = re.compile(rf"{_NAME}$", re.I)
# In a text: KEY=x, "key": "x", --key x; with $ before it, or nothing behind it, no secret is there yet.
_INSIDE = re.compile(
    rf"(?:{_NAME}[\"']?\s*[=:]|--[\w-]*{_NAME}\s)\s*[\"']?(?![-$\s]|null\b|true\b|false\b)(?=\S)", re.I
)
_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}|Bearer\s+[\w.~+/-]{6,})"
    r"|://[^/\s@]*:[^/\s@]+@"
)


def without_secrets(value, held: list[str], name: str = ""):
    """A copy of settings or of a command's words in which "(secret)" stands for each text that holds one; `held` gets
    the places, like "env WANDB_API_KEY" or "judge_command --hf-token"."""
    if isinstance(value, dict):
        return {key: without_secrets(item, held, f"{name} {key}".strip()) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        flags = [f"{name} {word}" if re.fullmatch(r"--?[\w-]+", str(word)) else name for word in ("", *value)]
        return [without_secrets(item, held, flag) for item, flag in zip(value, flags, strict=False)]
    if not isinstance(value, str):
        return value
    inside = _INSIDE.search(value)
    named = value and not value.startswith(("-", "$")) and _NAMED.search(name)
    if not (inside or named or _SHAPE.search(value)):
        return value
    held.append(f"{name} {inside[0]}" if inside else name)
    return "(secret)"
