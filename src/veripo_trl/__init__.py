"""VerIPO on top of Hugging Face TRL. Import the submodules; this package itself stays light."""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version(__name__)
