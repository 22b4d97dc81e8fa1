"""Which width for which layer: sensitivities measured, the best assignment under a budget, and a check of it."""
