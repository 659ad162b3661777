"""Functions of the user's own that settings name as `module:function`: a reward, a source of rows, a judge."""

import importlib
import os
import sys
from collections.abc import Callable

from veripo_trl.errors import ConfigError


def is_user_function(name: str) -> bool:
    """Whether a setting has the form of `module:function`."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))


def user_function(name: str, *, setting: str) -> Callable:
    """The function that `module:function` names, of a module in the working directory or of an installed package.

    The working directory comes last on the import path, so that no file in it hides an installed package.

    Args:
        setting: what names it, for the message.

    Raises:
        ConfigError: there is none of that name, or the module cannot be imported.
    """
    if not is_user_function(name):
        raise ConfigError(f"{setting}: expected module:function, as in my_module:my_function; got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"{setting}: {name} cannot be imported (from {os.getcwd()}): {error}") from error
    if not callable(found):
        raise ConfigError(f"{setting}: {name}: expected a function, it is a {type(found).__name__}.")
    return found
