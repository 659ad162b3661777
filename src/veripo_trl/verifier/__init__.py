"""Judging rollouts: does the thinking conclude the answer that is given? From verdicts to preference pairs.

Judges that are models are reached over a server or loaded where they are used.
"""
