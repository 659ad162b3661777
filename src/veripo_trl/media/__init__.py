"""From a file to frames: containers told by their bytes, the decoding process, sampling, the frame cache, downloads.

What a frame is worth to a model (sizes in tokens, positions) is in `model`.
"""
