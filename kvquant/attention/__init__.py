"""Attention over quantised states."""
