"""vLLM, imported where it is used: what its engine is given, the trainer's engine, the evaluation's.

The same rows, ids and pixels as with transformers.
"""
