"""Answering question files and scoring them: the questions, generating, the journal that goes on after a kill, scores.

The scripts in `evaluation/` parse their arguments and call these.
"""
