"""Secrets in settings and commands, by their names and by their shapes: what is recorded or printed has none."""

import re

# How names end that hold a secret: hub_token, --hf-token, OPENAI_API_KEY, apiKeys, DB_PASS, Authorization; not eos_token,
# max_tokens, monkey, bypass.
_NAME = (
    r"(?<![a-z])(?:(?<!\b(?:pad|eos|bos|unk)[_-])(?:token|key)|(?:api|access|private|auth|hf|hub)[_-]?(?:token|key)s?"
    r"|secrets?|passwords?|passwd|passphrase|pass|pwd|credentials?|authorization)"
)
_NAMED = re.compile(rf"(?:{_NAME}|(?:^|\s)(?:-u|--(?:proxy-)?user))$", re.I)
# What is no secret yet or never is: a variable, a flag, a path, a special token, a small number (sort --key 2).
_HARMLESS = r"(?:[-$<~./]|(?:bearer|basic|token)\s+\$|(?:null|true|false|none)\b|\d{1,2}(?:[.,]\d{1,2})?(?![\w:-]))"
# In a text: KEY=x, "key": "x", --key x, curl -u me:x.
_INSIDE = re.compile(
    rf"(?:{_NAME}[\"']?\s*[=:]|--[\w-]*{_NAME}\s)\s*[\"']?(?!{_HARMLESS})(?=[^\s\"'])"
    r"|(?<![\w-])(?:-u|--(?:proxy-)?user)[\s=]+[\"']?(?=[^\s:\"']*[a-z])[^\s:$\"']+:(?=[^\s$])",
    re.I,
)
_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|(?:sk-|gsk_|nvapi-|r8_|api_org_)[\w-]{16,}|gh[pousr]_\w{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|ya29\.[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}|Bearer\s+[\w.~+/-]{6,})"
    r"|://[^/\s@]*:[^/\s@]+@|https?://[^/\s@$]+@"
)


def without_secrets(value, held: list[str], name: str = ""):
    """A copy of settings or of a command's words in which "(secret)" stands for each text that holds one; `held` gets
    the places, like "env WANDB_API_KEY" or "judge_command --hf-token"."""
    if isinstance(value, dict):
        return {key: without_secrets(item, held, f"{name} {key}".strip()) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        flags = [f"{name} {word}" if re.fullmatch(r"--?[\w-]+", str(word)) else name for word in ("", *value)]
        return [without_secrets(item, held, flag) for item, flag in zip(value, flags, strict=False)]
    if value is None or isinstance(value, bool):
        return value
    text = str(value)
    inside = _INSIDE.search(text)
    named = text and not re.match(_HARMLESS, text, re.I) and _NAMED.search(name)
    if named and named[0].lstrip().startswith("-"):  # -u
        named = re.fullmatch(r"[^:]*[a-z][^:]*:.+", text, re.I)
    if not (inside or named or _SHAPE.search(text)):
        return value
    held.append(f"{name} {inside[0]}" if inside else name)
    return "(secret)"
