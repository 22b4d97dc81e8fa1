"""kvquant's own backends, found through the same entry points as everyone else's."""
