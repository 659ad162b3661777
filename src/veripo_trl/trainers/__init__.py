"""Thin subclasses of TRL's trainers that carry video from the row to the gradient.

Methods that change them belong in files of their own, not here.
"""
