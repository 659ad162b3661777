"""Merge a LoRA adapter into its base, as `vllm serve` takes it: weights, config, processor and chat template.

    python recipes/merge_adapter.py outputs/grpo outputs/grpo_merged
    vllm serve outputs/grpo_merged

What the policy says of how it was trained to see goes along. An adapter that is to be trained on stays as it is.
"""

from veripo_trl.start import start

start()  # before torch is imported

import argparse
import sys

from veripo_trl.errors import run, settings_checked
from veripo_trl.model.policy import merge_adapter


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="a folder or a name on the Hub")
    parser.add_argument("output", help="a folder that is not there yet")
    parser.add_argument("--revision", help="of an adapter on the Hub")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the weights (default: as the base was saved)",
    )
    args = parser.parse_args(argv)
    with settings_checked():
        merge_adapter(args.adapter, args.output, revision=args.revision, dtype=args.dtype)
    print(f"{args.output}: {args.adapter} merged into its base")


if __name__ == "__main__":
    sys.exit(run(main))
