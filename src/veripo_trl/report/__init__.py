"""A run made visible: what is read of it, the pictures, one HTML page.

Reads what stages have written; nothing here is needed by a stage but the pictures.
"""
