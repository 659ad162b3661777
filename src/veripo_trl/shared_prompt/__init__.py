"""A group's prompt, computed once: its attention, the scoring of completions, the rollout.

Exact, and checked against plain rows at the first batch; trainers call it and fall back without it.
"""
