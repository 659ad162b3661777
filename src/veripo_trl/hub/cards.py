"""Cards (README.md) of what is pushed: written from what happened, nothing else."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import yaml

from veripo_trl.files.disk import read_parquet

TAG = "veripo_trl"  # of every card that is pushed: it tells repositories that a push of ours made from all others
METHOD = (
    "Made with veripo_trl, an independent implementation of VerIPO ([arXiv 2505.19000](https://arxiv.org/abs/2505.19000)"
    "): GRPO, a verifier of its rollouts, DPO on the resulting pairs, and GRPO again."
)
KINDS = {
    "rollouts": (
        "Rollouts of a GRPO run: every completion that the run sampled for training, before any filter. One row per "
        "completion: the question's fields, `completion`, `finish_reason` (`length`: cut off at the limit), `rewards` "
        "per function, `advantage` within its group, `step`, and `policy`: the model that the "
        "run started from (a completion was sampled by what training had made of it by that `step`)."
    ),
    "verdicts": (
        "Verdicts on rollouts. One row per rollout, by `rollout_id`: `format_ok`, `accuracy` (the training reward's own "
        "function), `consistency` of thinking and answer (`unknown` where the judge gave no readable verdict), "
        "`concluded_answer`, `repetition` (share of repeated word n-grams), `think_tokens`, and who judged."
    ),
    "pairs": (
        "Preference pairs in TRL's conversational format (`prompt`, `chosen`, `rejected`), built from verified rollouts "
        "of a GRPO run; `policy` is the model that the run started from. `kind` says why one side is preferred: "
        "`penalty` (wrong, repetitive or too short), `consistency` (thinking and answer disagree), `reflection` (two "
        "rollouts joined by a second look)."
    ),
}
STAGES = {
    "SFT": "supervised fine-tuning on questions with thinking (cold start)",
    "GRPO": "GRPO on verifiable rewards",
    "DPO": "DPO on preference pairs of verified rollouts",
}
LICENSE_NOTE = (
    "The licence is recorded as `{license}`. What this was made from has licences of its own (the questions and their "
    "media, the base model); see to those before you publish it."
)


def dataset_card(
    kind: str,
    *,
    repo_id: str,
    counts: dict[str, object],
    data_files: str = "*.parquet",
    inputs: dict[str, dict | str] | None = None,
    policy: str | None = None,
    judge: str | None = None,
    prompt_version: str | None = None,
    license: str = "unknown",
) -> str:
    """The card of a dataset.

    Args:
        kind: "rollouts", "verdicts" or "pairs". counts: shown as a table, in order.
        data_files: where the parquet files are in the repository, so that `load_dataset(repo_id)` reads them.
        inputs: what it was made from: {role: {"repo_id", "revision"} of the Hub, or a name}.
        policy: the model or adapter that the GRPO run started from which sampled the completions.
        judge, prompt_version: who judged consistency, by which version of the judge's prompt.
    """
    header = {
        "license": license,
        "pretty_name": f"{repo_id.split('/')[-1]} ({kind})",
        "tags": ["veripo", TAG, "trl", "video", kind],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": data_files}]}],
    }
    facts = {
        "Policy that the GRPO run started from": policy and shown_name(policy),
        "Judge": judge,
        "Version of the judge's prompt": prompt_version,
    }
    parts = [
        KINDS[kind],
        METHOD,
        _table("what", "count", counts),
        _table("origin", "", {**{key: value for key, value in facts.items() if value}, **_origins(inputs)}),
        "Paths of videos and images are relative to the folder of the source's media, which is not part of this "
        "dataset.",
        LICENSE_NOTE.format(license=license),
        f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset("{repo_id}", split="train")\n```',
    ]
    return _card(header, f"{repo_id.split('/')[-1]}", parts)


def model_card(
    *,
    repo_id: str,
    stage: str,
    adapter: bool,
    base: str,
    base_revision: str | None = None,
    base_on_hub: bool = True,
    counts: dict[str, object],
    inputs: dict[str, dict | str] | None = None,
    license: str = "unknown",
) -> str:
    """The card of a model or an adapter.

    Args:
        stage: "SFT", "GRPO" or "DPO". adapter: whether this is a LoRA adapter on `base`.
        base: what an adapter is for, or what full weights were trained from. base_on_hub: else only its folder's name
            is shown, for it means nothing elsewhere.
        counts: shown as a table, in order. inputs: as in `dataset_card`.
    """
    header = {
        "license": license,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["veripo", TAG, "trl", stage.lower(), *(["lora"] if adapter else [])],
    }
    if base_on_hub:
        header |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    shown = base if base_on_hub else f"{shown_name(base)} (a local folder, not on the Hub)"
    revision = f" at revision `{base_revision}`" if base_revision else ""
    what = "A LoRA adapter for" if adapter else "Full weights, trained from"
    parts = [f"{what} {shown}{revision}. Stage: {STAGES.get(stage, stage)}.", METHOD, _table("what", "count", counts)]
    parts += [_table("origin", "", _origins(inputs)), LICENSE_NOTE.format(license=license)]
    return _card(header, repo_id.split("/")[-1], parts)


def rollout_counts(files: Iterable[Path]) -> tuple[dict[str, object], str]:
    """(what a card's table says of a run's rollout files, the policy or policies that it started from)."""
    columns = ["question_id", "problem_type", "step", "finish_reason", "policy"]
    questions, steps, policies, kinds, cut, total = set(), set(), set(), Counter(), 0, 0
    for file in files:
        table = read_parquet(file, columns).to_pydict()
        questions.update(table["question_id"])
        steps.update(table["step"])
        policies.update(table["policy"])
        kinds.update(table["problem_type"])
        cut += table["finish_reason"].count("length")
        total += len(table["step"])
    counts = {"rollouts": total, "questions": len(questions), "steps": len(steps), "cut off at the limit": cut}
    counts |= {f"rollouts on {kind}": number for kind, number in sorted(kinds.items())}
    return counts, ", ".join(sorted(policies))


def read_card(card: str) -> tuple[dict, str]:
    """(the YAML header of a README.md, the text below it); without a readable header ({}, all of it)."""
    match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", card.removeprefix("\ufeff"), re.DOTALL | re.MULTILINE)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        header = None
    return (header, card.removeprefix("\ufeff")[match.end() :]) if isinstance(header, dict) else ({}, card)


def tags_of(header: dict) -> list:
    """The tags in a card's header, which may be one word."""
    tags = header.get("tags") or []
    return tags if isinstance(tags, list) else [tags]


def tagged(card: str) -> str:
    """A card whose header has `TAG`, added to a card that somebody wrote."""
    header, text = read_card(card)
    if TAG in (tags := tags_of(header)):
        return card
    header = yaml.safe_dump({**header, "tags": [*tags, TAG]}, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n{text.lstrip()}"


def shown_name(path: str) -> str:
    """A Hub name or a folder below the working directory as it is; of any other path its last part: others read it."""
    first = os.path.normpath(path).split(os.sep)[0]
    leaves = os.path.isabs(path) or first == os.pardir or first.startswith("~")
    return os.path.basename(os.path.abspath(path)) if leaves else path


def _card(header: dict, title: str, parts: list[str]) -> str:
    text = "\n\n".join(part for part in parts if part)
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\n{text}\n"


def _table(left: str, right: str, rows: dict[str, object]) -> str:
    if not rows:
        return ""
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---:|" if right else "|---|---|", *lines])


def _origins(inputs: dict[str, dict | str] | None) -> dict[str, str]:
    return {
        role: f"{item['repo_id']} at `{item['revision']}`" if isinstance(item, dict) else shown_name(item)
        for role, item in (inputs or {}).items()
    }


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
