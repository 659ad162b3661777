"""Check the rows of a training run before it: decode every video and image, count prompt tokens, write a manifest.

    python recipes/check_rows.py --config qwen2_5_vl_3b_lora/grpo.yaml --output manifest.jsonl
    accelerate launch -q recipes/grpo_video.py --config qwen2_5_vl_3b_lora/grpo.yaml --manifest manifest.jsonl

Takes the YAML and the options of the training recipe; those that do not concern rows are ignored. Needs the model's
config and processor, not its weights. A check that was broken off goes on where it stopped. Without arguments it
checks the embedded world.
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from grpo_video import GRPOArguments
from sft_video import StopArguments
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor
from trl import ModelConfig

from veripo_trl.data.rows import RowError, content_of, read_rows, rows_to_dataset
from veripo_trl.errors import ConfigError, run, settings_checked
from veripo_trl.files.disk import room_for, write_whole
from veripo_trl.files.run_folder import only_process
from veripo_trl.files.tables import printable
from veripo_trl.media.video import MediaError
from veripo_trl.model.encoding import PromptEncoder, PromptTooLongError
from veripo_trl.model.policy import SUPPORTED, adapter_config
from veripo_trl.recipe import stages
from veripo_trl.trainers.grpo import VideoGRPOConfig
from veripo_trl.trainers.sft import VideoSFTConfig

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "sft.yaml"
# What a verdict does not depend on: a broken check may go on with others of these.
NO_SETTINGS = ("eval_datasets", "holdout", "manifest", "train_vision_tower", "tiny_world", "frame_cache",
               "frame_cache_gb")  # fmt: skip
SHOWN = 10  # rows without an id that are printed; the rest are counted


@dataclass
class CheckArguments:
    """What the check adds to the training recipe's arguments."""

    output: str = field(
        default="manifest.jsonl",
        metadata={
            "help": "The manifest, a .jsonl file; `<output>.partial` while it grows. With `frame_cache` set, the check "
            "also fills that folder, so that training finds its frames decoded."
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "Decode the first n rows only, to try it out; the manifest knows no others."}
    )
    num_workers: int | None = field(
        default=None, metadata={"help": "Processes that decode; 0 for none besides this one. Default: one per core."}
    )

    def __post_init__(self):
        if not self.output.endswith(".jsonl"):
            raise ConfigError(f"--output {self.output}: expected a name that ends in .jsonl.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit: expected 1 or more, got {self.limit}.")


class CheckedRows(Dataset):
    """A dataset's rows as lines of the manifest, each made when it is asked for."""

    def __init__(self, dataset, encoder: PromptEncoder):
        self.dataset, self.encoder = dataset, encoder

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return check_row(self.encoder, self.dataset[index])


def check_row(encoder: PromptEncoder, row: dict) -> dict:
    """Encode one row; {"question_id", "ok", "reason", "detail", "prompt_tokens"}, `content`
    of good ones. Reasons are few, to be counted."""
    try:
        prompt = encoder.encode(row)
    except RowError as error:
        return bad(row["question_id"], reason_of(error.problems[0]), str(error))
    except MediaError as error:
        # "row …, video …: is a truncated mp4: its moov …" -> "video: is a truncated mp4"
        kind, text = re.match(r"row .+?, (video|image) .+?['\"]: (.+)", str(error), re.DOTALL).groups()
        return bad(row["question_id"], f"{kind}: {re.split('[:;,(]', text)[0].strip()}", str(error))
    except PromptTooLongError as error:
        return bad(row["question_id"], "prompt longer than max_prompt_tokens", str(error))
    tokens = len(prompt)
    line = {"question_id": row["question_id"], "ok": True, "reason": None, "detail": None, "prompt_tokens": tokens}
    return {**line, "content": content_of(row)}


def bad(question_id: str, reason: str, detail: str) -> dict:
    return {"question_id": question_id, "ok": False, "reason": reason, "detail": detail, "prompt_tokens": None}


def reason_of(problem: dict) -> str:
    """The kind of a problem of `rows`, without the parts that differ from row to row."""
    name, expected = problem["field"], problem["expected"]
    if expected == "an id used once":
        return f"{name}: used twice"
    if name not in ("videos", "images") or expected == "a list of paths":
        return f"{name}: malformed"
    kinds = {"a file": "missing", "a regular file": "no file", "a media file": "empty"}
    return f"{name}: {kinds.get(expected, 'outside of media_root')}"


def describe(problem: dict) -> str:
    place = f"{problem['file']} row {problem['row']}, {problem['field']}"
    return printable(f"{place}: expected {problem['expected']}; came {problem['came']}. {problem['remedy']}")


@settings_checked()
def make_encoder(model_args: ModelConfig, data_args: stages.DataArguments) -> PromptEncoder:
    """The training stage's encoder, of the config and processor of a model, or of an adapter's base, alone."""
    name = model_args.model_name_or_path
    revision = None if model_args.model_revision == "main" else model_args.model_revision
    stages.see_as_trained(data_args, name, revision)
    if (adapter := adapter_config(name, revision)) is not None:
        name, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    config = AutoConfig.from_pretrained(name, revision=revision)
    if config.model_type not in SUPPORTED:
        raise ConfigError(f"{name} is a model of type {config.model_type!r}; expected one of {sorted(SUPPORTED)}.")
    processor = AutoProcessor.from_pretrained(name, revision=revision, padding_side="left")
    return stages.encoder_from_config(config, processor, data_args)


def settings_of(data_args: stages.DataArguments, model_args: ModelConfig, encoder: PromptEncoder, rows: list) -> dict:
    """First line of the manifest: what its verdicts hold for."""
    text = json.dumps([sorted(row.items()) for row in rows])
    header = {"manifest": 1, "model": model_args.model_name_or_path, "revision": model_args.model_revision}
    header |= {key: value for key, value in asdict(data_args).items() if key not in NO_SETTINGS}
    header |= {"prompt_template_hash": encoder.template.hash, "rows_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.loads(json.dumps(header, default=str))


def read_partial(path: Path, header: dict) -> dict[str, dict]:
    """{question_id: line} of a check that was broken off. Cuts off a line that was not written to its end."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    try:
        found, *lines = map(json.loads, whole.splitlines()) if whole else [header]
        found = dict(found)
        done = {line["question_id"]: line for line in lines}
    except (ValueError, TypeError, LookupError) as error:
        raise SystemExit(f"{path} is damaged ({error}). Remove it: the check then starts from the first row.") from error
    if differing := [key for key in sorted({*found, *header}) if found.get(key) != header.get(key)]:
        raise ConfigError(
            f"{path} is of a check with other settings or rows (different: {', '.join(differing)}). Go on with the old "
            f"ones, remove it, or choose another --output."
        )
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
    elif whole != content:
        os.truncate(path, len(whole))
    if lines:
        print(f"{path}: going on, {len(lines)} rows are checked already", flush=True)
    return done


def check(rows: list[dict], encoder: PromptEncoder, partial: Path, done: dict[str, dict], *, num_workers: int) -> None:
    """Check the rows that are not in `done`; adds their lines to it and, as they come, to the file `partial`."""
    todo = rows_to_dataset([row for row in rows if row["question_id"] not in done])
    num_workers = min(num_workers, len(todo))
    if num_workers:
        encoder.loader.decode_threads = 1  # a decoder per worker, and a worker per core
    # Unordered, so that one slow video holds up no other row's line.
    lines = DataLoader(CheckedRows(todo, encoder), batch_size=None, num_workers=num_workers, in_order=num_workers == 0)
    failed = sum(not line["ok"] for line in done.values())
    with (
        open(partial, "ab", buffering=0) as file,
        tqdm(lines, total=len(rows), initial=len(done), desc="rows", unit="row") as bar,
    ):
        for line in bar:
            written = (json.dumps(line) + "\n").encode()
            with room_for(partial, len(written)):
                file.write(written)
            done[line["question_id"]] = line
            failed += not line["ok"]
            bar.set_postfix(bad=failed, refresh=False)
    encoder.loader.close()


def report(lines: list[dict], nameless: list[dict], output: str) -> None:
    """Print the tables and how to go on."""
    good = [line["prompt_tokens"] for line in lines if line["ok"]]
    table = {"rows": len(lines) + len(nameless), "good": len(good), "bad": len(lines) + len(nameless) - len(good)}
    if good:
        places = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
        table |= {f"tokens {name}": int(np.percentile(good, place)) for name, place in places.items()}
    stages.print_table("Rows, and tokens of the good rows' prompts", [table])
    reasons = Counter(line["reason"] for line in lines if not line["ok"])
    reasons.update(["no usable id"] * len(nameless))
    if reasons:
        stages.print_table("Bad rows", [{"reason": reason, "rows": n} for reason, n in reasons.most_common()])
    for problem in nameless[:SHOWN]:
        print(describe(problem))
    if nameless:
        print(f"{len(nameless)} rows have no usable id: no manifest can name them, so training refuses them. Repair.")
    if good:
        print(f"\nmanifest: {output}. Train on the {len(good)} good rows with: --manifest {output}", flush=True)
    else:
        print(f"\nmanifest: {output}. No good rows are left.", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if good rows remain, else 1."""
    data_args, model_args, arguments = stages.parse(
        (stages.DataArguments, ModelConfig, CheckArguments),
        default_config=DEFAULT_CONFIG,
        argv=argv,
        ignored=(
            stages.ReportArguments, stages.PushArguments, GRPOArguments, StopArguments, VideoGRPOConfig, VideoSFTConfig
        ),
    )
    with only_process(arguments.output):
        return write_manifest(data_args, model_args, arguments)


def write_manifest(data_args: stages.DataArguments, model_args: ModelConfig, arguments: CheckArguments) -> int:
    if not data_args.datasets:
        raise ConfigError("Expected `datasets:`, a list of {path: …}; none was given.")
    if data_args.tiny_world is not None:
        from veripo_trl.tiny.world import make_world

        make_world(data_args.tiny_world)
    rows, problems = read_rows(data_args.datasets, allow_urls=data_args.allow_urls)
    nameless = [problem for problem in problems if problem["question_id"] is None]
    malformed = [bad(p["question_id"], reason_of(p), describe(p)) for p in problems if p["question_id"] is not None]
    # Training drops rows by id, so the first of two rows with one id goes with the second.
    refused = {line["question_id"]: line for line in malformed}
    malformed += [refused[row["question_id"]] for row in rows if row["question_id"] in refused]
    rows = [row for row in rows if row["question_id"] not in refused][: arguments.limit]
    encoder = make_encoder(model_args, data_args)
    header = settings_of(data_args, model_args, encoder, rows)
    partial = Path(arguments.output + ".partial")
    done = read_partial(partial, header)
    num_workers = os.cpu_count() if arguments.num_workers is None else arguments.num_workers
    if len(done) < len(rows):
        check(rows, encoder, partial, done, num_workers=num_workers)
    lines = malformed + [done[row["question_id"]] for row in rows]
    write_whole(arguments.output, "".join(json.dumps(line) + "\n" for line in [header, *lines]).encode())
    partial.unlink()
    report(lines, nameless, arguments.output)
    return 0 if any(line["ok"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(run(main))
