"""Stands for a user who stops the program while a plugin is being imported."""

raise KeyboardInterrupt
