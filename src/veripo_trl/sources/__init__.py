"""Public data sets, a module each: where it comes from, its licence, its columns and traps, and how an official record
becomes rows; training (`source:` of an entry of `datasets:`) and evaluation (`--benchmark`) share them.

A module has `NAME`, `convert(record, *, file)`, a list in which a dict is a row and a text is something to count (why a
row was left out, or what was changed in it), and where the official file is nested or keyed by video `records(content,
file=)`, the list of its records. Optional: `VIDEOS` (where they are expected), `ID` (the official column that is the
row's id), `totals` (a benchmark's own aggregate, see `vsi_bench`), `categories_of_released`. Nothing here reads a file.
"""

# Those that have an official test set: the names that `--benchmark` takes.
BENCHMARKS = ("lvbench", "mmvu", "tomato", "video_mme", "video_mmmu", "vsi_bench")
