"""What a user brings as ``--model module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paperback.errors import DataError
from paperback.study.wording import one_sentence


def users_function(address: str, purpose: str) -> Callable[..., Any]:
    """The function behind an import path; modules in the working directory are found too.

    Args:
        address: "module:function".
        purpose: what the function has to do, for the message: "called with the width, returns a layer".

    Returns:
        The function.

    Raises:
        DataError: if there is none, saying what is missing.
    """
    module, _, name = address.partition(":")
    if not name or os.sep in address or Path(address).exists():
        raise DataError(f"--model is {address}; give module:function, {purpose}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"--model {address}: there is no module {error.name}; run from its folder, or set PYTHONPATH."
        ) from error
    except Exception as error:  # whatever the user's module does is said in a sentence
        raise DataError(f"--model {address}: the module gave {one_sentence(error)}") from error
    function = getattr(found, name, None)
    if function is None:
        raise DataError(f"--model {address}: the module has no {name}; check the name.")
    if not callable(function):
        raise DataError(f"--model {address} is a {type(function).__name__}; give a function, {purpose}.")
    checked: Callable[..., Any] = function
    return checked
