"""What "correct" means: what a completion answers, whether that is right, and the rewards that TRL is given.

Pure functions of texts; training, verifier and evaluation call the same ones. Nothing here knows files or models.
"""
