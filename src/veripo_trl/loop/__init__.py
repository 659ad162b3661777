"""VerIPO's loop over the recipes: which stages a YAML means, running them one after another, what a run shows.

Stages are processes of their own: nothing here trains, and nothing below imports this room.
"""
