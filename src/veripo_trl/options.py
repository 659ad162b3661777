"""Options of a command, as the fields of a dataclass."""

from dataclasses import field


def option(help: str, default=None, **metadata):
    """A field with what `--help` says of it; `metadata` as argparse takes it, like choices."""
    return field(default=default, metadata={"help": help, **metadata})
