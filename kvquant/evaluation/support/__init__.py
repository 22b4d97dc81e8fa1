"""What works with a quantised cache, found out by running it."""
