"""VerIPO on top of Hugging Face TRL. Import the submodules; this package itself stays light."""

import io
import sys

# Under a locale without UTF-8 a print of "→" would end a training; stderr escapes such characters from the start.
if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
    sys.stdout.reconfigure(errors="backslashreplace")
