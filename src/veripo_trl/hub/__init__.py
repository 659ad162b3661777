"""Names here or on the Hub, what is pushed there with the check that it arrived, and the cards that it gets.

The network is reached through huggingface_hub alone.
"""
