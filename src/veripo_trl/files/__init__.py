"""Files of a run: written whole, locked, read as they were written; tables, and what must not be in them (secrets).

Nothing here knows what is in them.
"""
