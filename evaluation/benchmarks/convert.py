"""Make an evaluation file from a benchmark's official data.

    python evaluation/benchmarks/convert.py vsi_bench --input test-00000-of-00001.parquet --output vsi_bench.json

`--input`: one or more .parquet, .json or .jsonl files, or folders of them. Prints where the videos are expected.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import BENCHMARKS  # found only after the line above
from veripo_trl.data.files import SUFFIXES, is_data_file, read_json, uncompressed
from veripo_trl.data.schema import RowError
from veripo_trl.errors import run
from veripo_trl.evaluate.questions import read_questions, read_records
from veripo_trl.files.tables import write_json


def read_official(path: Path) -> list[dict]:
    """Records of an official file: a Parquet table, lines of JSON, a list, or a dict of records by id."""
    if uncompressed(path).suffix == ".json" and isinstance(content := read_json(path), dict):
        return list(content.values())
    return read_records(path)


def find_files(inputs: list[Path]) -> list[Path]:
    files = []
    for path in inputs:
        found = sorted(file for file in path.rglob("*") if is_data_file(file)) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise RowError(f"{path}: expected a {', '.join(SUFFIXES)} file or a folder with some.")
        files += found
    return files


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    benchmark = BENCHMARKS[args.benchmark]
    rows, left_out = [], 0
    for file in find_files(args.input):
        for number, record in enumerate(read_official(file), start=1):
            try:
                made = benchmark.convert(record, file=str(file))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise RowError(
                    f"{file}, record {number}: not in {benchmark.NAME}'s official columns "
                    f"({type(error).__name__}: {error}). Its columns: {', '.join(map(str, record))}."
                ) from error
            rows += made
            left_out += not made
    write_json(args.output, rows)
    read_questions(args.output)  # every check of rows
    more = f"; {left_out} records left out, see {Path(benchmark.__file__).name}" if left_out else ""
    print(f"{args.output}: {len(rows)} questions{more}")
    print(f"videos are expected at <video_dir>/{benchmark.VIDEOS}")


if __name__ == "__main__":
    sys.exit(run(main))
