"""A plugin whose hook raises."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("hook-raises", "nowhere:Nothing", Capabilities(nbits=(4,)), from_the_future=True)]
