"""What is pushed to the Hub and found there: the check that it arrived, runs, cards.

The network is reached through huggingface_hub alone.
"""
