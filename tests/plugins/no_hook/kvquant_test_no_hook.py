"""A plugin without any hook."""

VALUE = 1
