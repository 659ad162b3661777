"""The benchmarks: a module each, by the name that `convert.py` and `calculate_score.py` know it by."""

from . import lvbench, mmvu, tomato, video_mme, video_mmmu, vsi_bench

MODULES = (vsi_bench, video_mmmu, mmvu, tomato, lvbench, video_mme)
BENCHMARKS = {module.__name__.rpartition(".")[2]: module for module in MODULES}
