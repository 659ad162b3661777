"""One HTML page about a run: curves, questions with their frames and rollouts, pairs, results.

    python recipes/report.py outputs/tiny_grpo
    python recipes/report.py outputs/tiny_grpo outputs/tiny_verify --output report.html     # stages of one story

A folder with `run.json` (a loop) gives all of its stages. The page opens from disk and needs no network.
"""

import argparse
import sys

from veripo_trl.errors import run
from veripo_trl.report.write import write_report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", help="Folder of a loop or of a stage; several: stages, in their order."
    )
    parser.add_argument("--output", help="The page (default: report.html in the first folder).")
    parser.add_argument(
        "--questions", type=int, default=40, help="Questions shown with their frames (default: 40)."
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Draws what is on the page where not all fits (default: 0).",
    )
    parser.add_argument(
        "--media_root", help="Folder of the videos and images (default: what the run recorded)."
    )
    parser.add_argument(
        "--max_mb",
        type=float,
        default=20.0,
        help="About the largest size of the page (default: 20).",
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        default=[],
        help="Benchmark results besides the run's: *.scores.json.",
    )
    arguments = parser.parse_args(argv)
    if arguments.questions < 0 or arguments.max_mb <= 0:
        parser.error("expected --questions 0 or more and --max_mb above 0")
    path = write_report(**vars(arguments))
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    sys.exit(run(main))
