"""A plugin that ends the program when it is imported."""

import sys

sys.exit("wrong Python")
