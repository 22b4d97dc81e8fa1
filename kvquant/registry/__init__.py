"""Backends by name. Knows no torch."""

from kvquant.registry.availability import Availability
from kvquant.registry.resolve import Backend, get_backend, list_backends, refresh, register, unregister

__all__ = ["Availability", "Backend", "get_backend", "list_backends", "refresh", "register", "unregister"]
