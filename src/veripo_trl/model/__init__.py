"""A policy and what it is shown: loading and saving it, a row as tensors, M-RoPE positions, vision features.

Nothing here samples or trains.
"""
