"""``python -m kvquant``: the same as the command ``kvquant``."""

from kvquant.cli.main import main

if __name__ == "__main__":
    main()
