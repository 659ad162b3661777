"""VerIPO on top of Hugging Face TRL. Import the submodules; this package itself stays light."""

import io
import logging
import sys

# Under a locale without UTF-8 a print of "→" would end a training; stderr escapes such characters from the start.
if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
    sys.stdout.reconfigure(errors="backslashreplace")


class _NoBitsandbytes:
    """Keeps `import peft`, which comes with transformers' trainers, from importing bitsandbytes for one rare helper: a
    second of every start. What quantizes imports it later; TRL's GRPO trainer does in any case."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        helpers = sys.modules.get("peft.helpers")
        if name == "bitsandbytes" and helpers is not None and not hasattr(helpers, "bnb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _NoBitsandbytes)
# On some CPUs its import warns of a kernel for what `policy.load_policy` turns off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
