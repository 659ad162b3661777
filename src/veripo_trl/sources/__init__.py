"""Public data sets and benchmarks, a module each (add one here): where it comes from, its licence, its columns and
traps, and how an official record becomes rows; training (`source:` of an entry of `datasets:`) and evaluation
(`--benchmark`) share them.

A module has `NAME`, `convert(record, *, file)`, a list in which a dict is a row (its `data_source` is NAME unless it says
another) and a text is something to count (why a row was left out, or what was changed in it), and where the official
file is nested or keyed by video `records(content, file=)`, the list of its records. Optional: `VIDEOS` (where they are
expected; said where none is found), `ID` (the official column that is the row's id), `totals` (a benchmark's own
aggregate, see `vsi_bench`), `categories_of_released`. A form of rows that is no data set (`ms_swift`) has no NAME.

A part of a video is a file of its own: such a row names it, `<name>_<start>-<end>.mp4`, and its `cut` says what to cut.
`evaluation/cut_videos.py` cuts them; nothing here reads a video.
"""

# Those that have an official test set: the names that `--benchmark` takes.
BENCHMARKS = (
    "activitynet charades_sta clevrer lvbench mmvu mvbench next_gqa ovo_bench seed_bench_r1 streaming_bench tempcompass"
    " time_r1 tomato video_hallu video_holmes video_mme video_mmmu vsi_bench"
).split()
