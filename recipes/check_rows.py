"""Check the rows of a training run before it: decode every video and image, count prompt tokens, write a manifest.

    python recipes/check_rows.py --config qwen2_5_vl_3b_lora/grpo.yaml --output manifest.jsonl
    accelerate launch -q recipes/grpo_video.py --config qwen2_5_vl_3b_lora/grpo.yaml --manifest manifest.jsonl

Takes the YAML and the options of the training recipe; those that do not concern rows are ignored. Needs the model's
config and processor, not its weights. A check that was broken off goes on where it stopped. Without arguments it
checks the embedded world.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from trl import ModelConfig

from veripo_trl.errors import ConfigError, run
from veripo_trl.files.disk import write_whole
from veripo_trl.files.run_folder import only_process
from veripo_trl.files.tables import print_table
from veripo_trl.recipe.arguments import SHARED, DataArguments, GRPOArguments, StopArguments, option, parse
from veripo_trl.recipe.build import revision_of, see_as_trained
from veripo_trl.recipe.row_check import check_rows, encoder_without_weights, read_checkable, settings_of
from veripo_trl.tiny.world import make_world
from veripo_trl.trainers.grpo import VideoGRPOConfig
from veripo_trl.trainers.sft import VideoSFTConfig

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "sft.yaml"
IGNORED = (*SHARED, GRPOArguments, StopArguments, VideoGRPOConfig, VideoSFTConfig)


@dataclass
class CheckArguments:
    """What the check adds to the training recipe's arguments."""

    output: str = option(
        "The manifest, a .jsonl file; `<output>.partial` while it grows. With `frame_cache` set, the check also fills "
        "that folder, so that training finds its frames decoded.",
        default="manifest.jsonl",
    )
    limit: int | None = option("Decode the first n rows only, to try it out; the manifest knows no others.")
    num_workers: int | None = option("Processes that decode; 0 for none besides this one. Default: one per core.")

    def __post_init__(self):
        if not self.output.endswith(".jsonl"):
            raise ConfigError(f"--output {self.output}: expected a name that ends in .jsonl.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit: expected 1 or more, got {self.limit}.")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if good rows remain, else 1."""
    kinds = (DataArguments, ModelConfig, CheckArguments)
    data_args, model_args, arguments = parse(kinds, default_config=DEFAULT_CONFIG, argv=argv, ignored=IGNORED)
    with only_process(arguments.output):
        return write_manifest(data_args, model_args, arguments)


def write_manifest(data_args: DataArguments, model_args: ModelConfig, arguments: CheckArguments) -> int:
    if not data_args.datasets:
        raise ConfigError("Expected `datasets:`, a list of {path: …}; none was given.")
    if data_args.tiny_world is not None:
        make_world(data_args.tiny_world)
    rows, malformed = read_checkable(data_args)
    rows = rows[: arguments.limit]
    data_args = see_as_trained(data_args, model_args.model_name_or_path, revision_of(model_args))
    encoder = encoder_without_weights(model_args, data_args)
    settings = settings_of(data_args, model_args, encoder, rows)
    partial = Path(arguments.output + ".partial")
    num_workers = os.cpu_count() if arguments.num_workers is None else arguments.num_workers
    lines = malformed + check_rows(rows, encoder, partial, settings, num_workers=num_workers)
    write_whole(arguments.output, "".join(json.dumps(line) + "\n" for line in [settings, *lines]).encode())
    partial.unlink()
    return report(lines, arguments.output)


def report(lines: list[dict], output: str) -> int:
    """Print the tables and how to go on; the exit code."""
    good = [line["prompt_tokens"] for line in lines if line["ok"]]
    table = {"rows": len(lines), "good": len(good), "bad": len(lines) - len(good)}
    if good:
        shares = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
        table |= {f"tokens {name}": int(np.percentile(good, share)) for name, share in shares.items()}
    print_table("Rows, and tokens of the good rows' prompts", [table])
    if reasons := Counter(line["reason"] for line in lines if not line["ok"]):
        print_table("Bad rows", [{"reason": reason, "rows": n} for reason, n in reasons.most_common()])
    remedy = f"Train on the {len(good)} good rows with: --manifest {output}" if good else "No good rows are left."
    print(f"\nmanifest: {output}. {remedy}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run(main))
