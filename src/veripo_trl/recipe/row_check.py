"""The check of a run's rows before training: each is encoded once, and a manifest says which are good, and why not."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor
from trl import ModelConfig

from veripo_trl.data.prompts import PromptError, build_target
from veripo_trl.data.rows import read_rows
from veripo_trl.data.schema import RowError, content_of, line_of, row_error, rows_to_dataset
from veripo_trl.errors import ConfigError, settings_checked
from veripo_trl.files.journal import Journal
from veripo_trl.files.tables import print_table, printable
from veripo_trl.media.downloads import NetworkError
from veripo_trl.media.video import MediaError
from veripo_trl.model.encoding import PromptEncoder, PromptTooLongError
from veripo_trl.model.policy import find_base
from veripo_trl.options import option
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import encoder_from_config, revision_of

# What a verdict does not depend on: a broken check may go on with others of these.
NO_SETTINGS = ("eval_datasets", "holdout", "manifest", "train_vision_tower", "tiny_world", "frame_cache",
               "frame_cache_gb")  # fmt: skip


@dataclass
class CheckArguments:
    """What the check adds to the training recipe's arguments."""

    output: str = option(
        "The manifest, a .jsonl file; `<output>.partial` while it grows. With `frame_cache` set, the check also fills "
        "that folder, so that training finds its frames decoded.",
        "manifest.jsonl",
    )
    limit: int | None = option("Check the first n rows only; the manifest knows no others.")
    num_workers: int | None = option("Processes that decode, 0: this one. Default: one per core.")

    def __post_init__(self):
        if not self.output.endswith(".jsonl"):
            raise ConfigError(f"--output {self.output}: expected a name that ends in .jsonl.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit: expected 1 or more, got {self.limit}.")


def check_row(encoder: PromptEncoder, row: dict) -> dict:
    """Encode one row: {"question_id", "ok", "reason", "detail", "prompt_tokens"}, `content` of good ones. Reasons are
    few, to be counted. `ok` is None where the network was down, so that nothing is known of the row.
    """
    try:
        if row["process"]:
            build_target(row, encoder.template)
        prompt = encoder.encode(row)
    except NetworkError as error:
        return {"question_id": row["question_id"], "ok": None, "detail": str(error)}
    except PromptError as error:
        return bad(row["question_id"], "does not fit the prompt template", str(error))
    except RowError as error:
        return bad(row["question_id"], reason_of(error.problems[0]), str(error))
    except MediaError as error:
        # "row …, video …: is a truncated mp4: its moov …" -> "video: is a truncated mp4"
        kind, text = re.match(r"row .+?, (video|image) .+?['\"]: (.+)", str(error), re.DOTALL).groups()
        return bad(row["question_id"], f"{kind}: {re.split('[:;,(]', text)[0].strip()}", str(error))
    except PromptTooLongError as error:
        return bad(row["question_id"], "prompt longer than max_prompt_tokens", str(error))
    line = {"question_id": row["question_id"], "ok": True, "reason": None, "detail": None}
    return {**line, "prompt_tokens": len(prompt), "content": content_of(row)}


def bad(question_id: str, reason: str, detail: str) -> dict:
    return {"question_id": question_id, "ok": False, "reason": reason, "detail": detail, "prompt_tokens": None}


def reason_of(problem: dict) -> str:
    """The kind of a problem of `data.rows`: what came instead differs from row to row."""
    return f"{problem['field']}: expected {problem['expected']}"


def read_checkable(data_args: DataArguments) -> tuple[list[dict], list[dict]]:
    """(rows to encode; the manifest's lines of malformed ones).

    Raises:
        RowError: rows without a usable id, which no manifest can name.
    """
    if not data_args.datasets:
        raise ConfigError("Expected `datasets:`, a list of {path: …}; none was given.")
    rows, problems = read_rows(data_args.datasets, allow_urls=data_args.allow_urls)
    if nameless := [problem for problem in problems if problem["question_id"] is None]:
        raise row_error(nameless, "without a usable id, which no manifest can name")
    malformed = [bad(p["question_id"], reason_of(p), printable(line_of(p))) for p in problems]
    # Training drops rows by id, so the first of two rows with one id goes with the second.
    refused = {line["question_id"]: line for line in malformed}
    malformed += [refused[row["question_id"]] for row in rows if row["question_id"] in refused]
    return [row for row in rows if row["question_id"] not in refused], malformed


@settings_checked()
def encoder_without_weights(model_args: ModelConfig, data_args: DataArguments) -> PromptEncoder:
    """The training stage's encoder, of the config and processor of a model, or of an adapter's base, alone."""
    _, name, revision, _ = find_base(model_args.model_name_or_path, revision_of(model_args))
    config = AutoConfig.from_pretrained(name, revision=revision)
    processor = AutoProcessor.from_pretrained(name, revision=revision, padding_side="left")
    return encoder_from_config(config, processor, data_args)


def settings_of(data_args: DataArguments, model_args: ModelConfig, encoder: PromptEncoder, rows: list) -> dict:
    """What verdicts depend on: the first line of the manifest, and of the journal while it grows."""
    text = json.dumps([sorted(row.items()) for row in rows])
    header = {"manifest": 1, "model": model_args.model_name_or_path, "revision": model_args.model_revision}
    header |= {key: value for key, value in asdict(data_args).items() if key not in NO_SETTINGS}
    header |= {"prompt_template_hash": encoder.template.hash, "rows_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.loads(json.dumps(header, default=str))


def check_rows(rows: list[dict], encoder: PromptEncoder, file: Path, settings: dict, *, num_workers: int) -> list[dict]:
    """A line of the manifest for each row, in their order.

    Args:
        file: a journal of the lines so far: a check that was broken off goes on from it.

    Raises:
        JournalError: it is of other settings. NetworkError: URLs were not reached; all other rows are checked.
    """
    journal = Journal(file, settings, key="question_id")
    if journal.lines:
        print(f"{file}: going on, {len(journal.lines)} rows are checked already", flush=True)
    todo = [row for row in rows if row["question_id"] not in journal.lines]
    num_workers = min(num_workers, len(todo))
    if num_workers:
        encoder.loader.decode_threads = 1  # a decoder per worker, and a worker per core
    failed, unreached = sum(not line["ok"] for line in journal.lines.values()), []
    if todo:
        # Unordered, so that one slow video holds up no other row's line.
        loader = DataLoader(
            rows_to_dataset(todo),
            batch_size=None,
            collate_fn=partial(check_row, encoder),
            num_workers=num_workers,
            in_order=not num_workers,
        )
        with tqdm(loader, total=len(rows), initial=len(rows) - len(todo), desc="rows", unit="row") as bar:
            for line in bar:
                if line["ok"] is None:
                    unreached.append(line)
                    continue
                journal.append([line])
                failed += not line["ok"]
                bar.set_postfix(bad=failed, refresh=False)
        encoder.loader.close()
    if unreached:
        raise NetworkError(
            f"{len(unreached)} rows were not reached, all others are checked; the same command tries these again. "
            + "\n".join(line["detail"] for line in unreached[:10])
        )
    return [journal.lines[row["question_id"]] for row in rows]


def report(lines: list[dict], output: str) -> int:
    """Print the tables and how to go on; the exit code."""
    good = [line["prompt_tokens"] for line in lines if line["ok"]]
    table = {"rows": len(lines), "good": len(good), "bad": len(lines) - len(good)}
    if good:
        shares = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
        table |= {f"tokens {name}": int(np.percentile(good, share)) for name, share in shares.items()}
    print_table("Rows, and tokens of the good rows' prompts", [table])
    if bad := [line for line in lines if not line["ok"]]:
        first = {line["reason"]: line for line in reversed(bad)}
        reasons = Counter(line["reason"] for line in bad).most_common()
        print_table("Bad rows", [{"reason": why, "rows": n, "such as": first[why]["question_id"]} for why, n in reasons])
        print(f"\n{printable(first[reasons[0][0]]['detail'])}\n(each in the manifest, as `detail`)")
    remedy = f"Train on the {len(good)} good rows with: --manifest {output}" if good else "No good rows are left."
    print(f"\nmanifest: {output}. {remedy}", flush=True)
    return 0 if good else 1
