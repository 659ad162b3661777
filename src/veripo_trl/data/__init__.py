"""Rows and what they become: their files and checks, the prompts and their templates, the store of rollouts.

Nothing here opens a video or loads a model.
"""
