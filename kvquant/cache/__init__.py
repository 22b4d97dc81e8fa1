"""The face that transformers sees."""
