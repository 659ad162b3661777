"""The benchmarks: a module each, by the name that `convert.py` and `calculate_score.py` know it by."""

from . import lvbench, mmvu, tomato, video_mme, video_mmmu, vsi_bench

BENCHMARKS = {
    "vsi_bench": vsi_bench,
    "video_mmmu": video_mmmu,
    "mmvu": mmvu,
    "tomato": tomato,
    "lvbench": lvbench,
    "video_mme": video_mme,
}
