"""Measuring caches: what they cost and what they keep."""
