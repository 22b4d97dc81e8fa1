"""What is done to states before they are quantised, and undone, or never needs to be, when they are read."""
