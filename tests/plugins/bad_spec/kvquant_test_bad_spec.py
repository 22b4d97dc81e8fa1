"""A plugin with several mistakes in its declaration."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("bad-spec", "nowhere.Nothing", Capabilities(nbits=(5,), axes="channel"))]
