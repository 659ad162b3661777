"""VerIPO's loop: GRPO, verifier, DPO, and round again (arXiv 2505.19000).

    python recipes/veripo.py                                  # the tiny world: CPU, offline, minutes
    python recipes/veripo.py --config qwen2_5_vl_3b_lora/veripo.yaml --dry-run
    python recipes/veripo.py --config my_loop.yaml --until verify-1

One YAML names the stages in order, each a recipe of this folder (or a script of your own, with its `kind`) with its
configuration and overrides. Every stage runs as its own process, as a user would run it. The state of the run is
`<output_dir>/run.json`: killed anywhere, the same command goes on; finished stages are not run again. SIGTERM is passed
to the trainer, which writes a checkpoint.
"""

import argparse
import sys

from veripo_trl.errors import run
from veripo_trl.loop.check import dry_run
from veripo_trl.loop.plan import CONFIGS, read_loop
from veripo_trl.loop.run import run_loop

DEFAULT_CONFIG = CONFIGS / "tiny" / "veripo.yaml"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=str(DEFAULT_CONFIG),
        help="the loop's YAML, from here or recipes/configs/",
    )
    parser.add_argument("--output_dir", help="the run's folder; default: the configuration's")
    parser.add_argument(
        "--iterations", type=int, help="times round the loop; default: the configuration's"
    )
    parser.add_argument("--seed", type=int, help="of every stage; default: the configuration's")
    parser.add_argument(
        "--from", dest="first", metavar="STAGE", help="do this stage and all after it again"
    )
    parser.add_argument("--until", dest="last", metavar="STAGE", help="end after this stage")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would run, and write nothing"
    )
    given = parser.parse_args(argv)
    loop = read_loop(
        given.config, output_dir=given.output_dir, iterations=given.iterations, seed=given.seed
    )
    (dry_run if given.dry_run else run_loop)(loop, first=given.first, last=given.last)


if __name__ == "__main__":
    sys.exit(run(main))
