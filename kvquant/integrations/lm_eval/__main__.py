"""The harness's own command line, with the model ``kvquant`` in it."""

from __future__ import annotations

import os
import sys

from kvquant.errors import ConfigError, KVQuantError


def main() -> None:
    """Run the harness with the arguments given; errors of kvquant become one message and an exit code.

    Exit codes are those of ``kvquant``: 1 the thing asked for failed, 2 bad usage. With ``KVQUANT_DEBUG`` in the
    environment errors pass, for the traceback.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except KVQuantError as error:
        if os.environ.get("KVQUANT_DEBUG", "0") not in ("", "0"):
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
