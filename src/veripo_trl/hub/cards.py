"""Cards (README.md) of what is pushed: `templates/card.md`, filled in with what happened and nothing else."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CardData, RepoCard

from veripo_trl.files.disk import read_json, read_parquet

TAG = "veripo_trl"  # of every card that is pushed: it tells repositories that a push of ours made from all others
FACTS = {
    "policy": "Policy that the GRPO run started from",
    "judge": "Judge",
    "prompt_version": "Version of the judge's prompt",
    "prompt_template": "Hash of the policy's prompt template",
}
TEMPLATE = Path(__file__).parent / "templates" / "card.md"


def dataset_card(kind: str, *, repo_id, counts, data_files="*.parquet", inputs=None, license="unknown", **facts) -> str:
    """The card of a dataset.

    Args:
        kind: "rollouts", "verdicts" or "pairs". counts: shown as a table, in order.
        data_files: where the parquet files are in the repository, so that `load_dataset(repo_id)` reads them.
        inputs: what it was made from: {role: {"repo_id", "revision"} of the Hub, or a name}.
        facts: of `FACTS`: the model or adapter that the GRPO run started from which sampled the completions; who judged
            consistency, by which version of the judge's prompt; the prompt template's hash. `seen`: of `seen_by`.
    """
    header = {
        "license": license,
        "pretty_name": f"{repo_id.split('/')[-1]} ({kind})",
        "task_categories": ["video-text-to-text"],
        "tags": ["veripo", TAG, "trl", "video", kind],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": data_files}]}],
    }
    if facts.get("policy"):
        facts["policy"] = shown_name(facts["policy"])
    seen = facts.pop("seen", {})
    shown = {FACTS[name]: value for name, value in facts.items() if value}
    return fill_card(header, repo_id, {"counts": counts, "origins": shown | origins(inputs), "seen": seen}, kind=kind)


def rollout_counts(files: Iterable[Path]) -> tuple[dict[str, object], str]:
    """(what a card's table says of a run's rollout files, the policy or policies that it started from)."""
    rows = {name: [] for name in ("question_id", "problem_type", "step", "finish_reason", "policy", "rewards")}
    for file in files:
        for name, values in read_parquet(file, list(rows)).to_pydict().items():
            rows[name] += values
    counts = {"rollouts": len(rows["step"]), "questions": len(set(rows["question_id"])), "steps": len(set(rows["step"]))}
    counts["cut off at the limit"] = rows["finish_reason"].count("length")
    counts |= {f"rollouts on {kind}": number for kind, number in sorted(Counter(rows["problem_type"]).items())}
    for name in sorted({name for rewards in rows["rewards"] for name in rewards}):
        given = [rewards[name] for rewards in rows["rewards"] if rewards.get(name) is not None]
        counts[f"mean {name}"] = sum(given) / len(given) if given else "–"
    return counts, ", ".join(sorted(set(rows["policy"])))


def shown_name(path: str) -> str:
    """A Hub name as it is, a folder below the working directory relative to that; of any other path its last part:
    others read it."""
    path = os.path.relpath(path) if os.path.isabs(path) else path
    first = os.path.normpath(path).split(os.sep)[0]
    leaves = first == os.pardir or first.startswith("~")
    return os.path.basename(os.path.abspath(path)) if leaves else path


def local_name(path: str) -> str:
    """What a card says of a folder here."""
    return f"{shown_name(path)} (a local folder, not on the Hub)"


def fill_card(header: dict, repo_id: str, tables: dict[str, dict], **facts) -> str:
    """`templates/card.md` with a YAML header, its tables of two columns (counts, origins, seen, settings; an empty one
    is left out), and what else it asks for."""
    tables = {name: {_cell(key): _cell(value) for key, value in table.items()} for name, table in tables.items()}
    title = repo_id.split("/")[-1]
    return str(RepoCard.from_template(CardData(**header), TEMPLATE, title=title, repo_id=repo_id, **tables, **facts))


def seen_by(policy: str | Path) -> dict[str, object]:
    """How the policy in a folder was trained to see, for a card's table; {} if nothing there says so."""
    file = Path(policy) / "veripo_trl.json"
    if not file.is_file():
        return {}
    told = read_json(file, remedy="Put it right, or remove it: cards then do not say how the policy sees.")
    template = "{name} (hash {hash})".format(**told.pop("prompt_template"))
    return {"prompt template": template, **{key: value for key, value in told.items() if key != "base_weights"}}


def origins(inputs: dict[str, dict | str] | None) -> dict[str, str]:
    """What a card's table says of what something was made from."""
    return {
        role: f"{item['repo_id']} at `{item['revision']}`" if isinstance(item, dict) else shown_name(item)
        for role, item in (inputs or {}).items()
    }


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
