"""A plugin whose error has several lines, and orders for the terminal."""

raise ValueError("first line\nsecond\x1b[2J line" + "!" * 400)
