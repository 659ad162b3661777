"""Thin subclasses of TRL's trainers that carry video from the row to the gradient."""
