"""Check the rows of a training run before it: decode every video and image, count prompt tokens, write a manifest.

    python recipes/check_rows.py --config qwen2_5_vl_3b_lora/grpo.yaml --output manifest.jsonl
    accelerate launch -q recipes/grpo_video.py --config qwen2_5_vl_3b_lora/grpo.yaml --manifest manifest.jsonl

    python recipes/check_rows.py --config long_video/grpo.yaml --gpu_memory 80   # how many frames fit; without rows

Takes the YAML and the options of the training recipe; those that do not concern rows are ignored. Needs the model's
config and processor, not its weights. A check that was broken off goes on where it stopped. Without arguments it
checks the embedded world.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import json
import os
import sys
from pathlib import Path

from trl import ModelConfig

from veripo_trl.errors import run
from veripo_trl.files.disk import write_whole
from veripo_trl.files.run_folder import only_process, refuse_own_input
from veripo_trl.recipe import row_check as recipe
from veripo_trl.recipe.arguments import SHARED, DataArguments, GRPOArguments, StopArguments, parse
from veripo_trl.recipe.build import revision_of, see_as_trained
from veripo_trl.recipe.frames_that_fit import MemoryArguments, report_frames
from veripo_trl.tiny.world import make_world
from veripo_trl.trainers.grpo import VideoGRPOConfig
from veripo_trl.trainers.sft import VideoSFTConfig

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "sft.yaml"
ARGUMENTS = (DataArguments, ModelConfig, MemoryArguments, recipe.CheckArguments)
IGNORED = (*SHARED, GRPOArguments, StopArguments, VideoGRPOConfig, VideoSFTConfig)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if good rows remain, else 1."""
    parsed = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv, ignored=IGNORED)
    with only_process(parsed[-1].output):
        return write_manifest(*parsed)


def write_manifest(data_args, model_args, memory, arguments) -> int:
    if memory.gpu_memory is not None:
        data_args = see_as_trained(data_args, model_args.model_name_or_path, revision_of(model_args))
        report_frames(model_args, memory, recipe.encoder_without_weights(model_args, data_args))
        return 0
    if data_args.tiny_world is not None:
        make_world(data_args.tiny_world, questions=data_args.tiny_questions)
    rows, malformed = recipe.read_checkable(data_args)
    refuse_own_input(arguments.output, [source["path"] for source in data_args.datasets])
    rows = rows[: arguments.limit]
    data_args = see_as_trained(data_args, model_args.model_name_or_path, revision_of(model_args))
    encoder = recipe.encoder_without_weights(model_args, data_args)
    settings = recipe.settings_of(data_args, model_args, encoder, rows)
    partial = Path(arguments.output + ".partial")
    num_workers = os.cpu_count() if arguments.num_workers is None else arguments.num_workers
    lines = malformed + recipe.check_rows(rows, encoder, partial, settings, num_workers=num_workers)
    write_whole(arguments.output, "".join(json.dumps(line) + "\n" for line in [settings, *lines]).encode())
    partial.unlink()
    return recipe.report(lines, arguments.output)


if __name__ == "__main__":
    sys.exit(run(main))
