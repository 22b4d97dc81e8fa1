"""``python -m kvquant`` is the ``kvquant`` command."""

from kvquant.cli.main import main

if __name__ == "__main__":
    main()
