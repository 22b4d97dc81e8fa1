"""Where results go, looked at before the work that makes them."""

from __future__ import annotations

import os
from pathlib import Path

from kvquant.errors import OptionValueError


def check_writable(option: str, path: Path, *endings: str) -> None:
    """Refuse a file that could not be written when all is done.

    Args:
        option: what says so.
        path: the file; one that is there may be replaced.
        endings: those that its name may have, in lower case; any where none are said.

    Raises:
        OptionValueError: it has another ending, its folder does not exist, or it may not be written.
    """
    if endings and path.suffix.lower() not in endings:
        *others, last = endings
        told = f"{', '.join(others)} or {last}" if others else last
        raise OptionValueError(option, str(path), f"a file name that ends in {told}")
    if not path.absolute().parent.is_dir():
        raise OptionValueError(option, str(path), "a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise OptionValueError(option, str(path), "a file, and not a folder or a device")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise OptionValueError(option, str(path), "a file that may be written")
