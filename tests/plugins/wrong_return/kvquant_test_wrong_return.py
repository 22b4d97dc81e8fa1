"""A plugin whose hook returns a declaration that is not in a list."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return BackendSpec("wrong-return", "nowhere:Nothing", Capabilities(nbits=(4,)))
