"""A plugin that declares one name twice."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("declared-twice", "nowhere:Nothing", Capabilities(nbits=(width,))) for width in (2, 4)]
