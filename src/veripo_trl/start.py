"""Environment and warnings that a command sets before torch is imported. Importing the library sets nothing."""

import logging
import os
import sys

# In a file or a pipe a progress bar speaks every half minute, and one of less than that not at all.
SELDOM = {"TQDM_DELAY": "30", "TQDM_MININTERVAL": "30", "TQDM_MAXINTERVAL": "30"}


class _NoBitsandbytes:
    """Keeps `import peft`, which comes with TRL, from importing bitsandbytes for one rare helper: a second of every
    start. What quantizes imports it later; TRL's GRPO trainer does in any case."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        helpers = sys.modules.get("peft.helpers")
        if name == "bitsandbytes" and helpers is not None and not hasattr(helpers, "bnb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def start() -> None:
    """To be called first in a script that trains or answers."""
    # The loader's workers share the cores with the model: threads that spin while they wait would slow both many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
    if _NoBitsandbytes not in sys.meta_path:
        sys.meta_path.insert(0, _NoBitsandbytes)
    # On some CPUs its import warns of a kernel for what `policy.load_policy` turns off.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if "TQDM_DELAY" not in os.environ and not sys.stderr.isatty():
        os.environ.update(SELDOM)  # read when tqdm is imported
