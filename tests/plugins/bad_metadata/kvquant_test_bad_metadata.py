"""A plugin whose metadata is damaged, as an interrupted installation leaves it."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("bad-metadata", "nowhere:Nothing", Capabilities(nbits=(4,)))]
