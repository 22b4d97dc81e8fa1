"""A plugin that declares another name than its entry point."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("another", "nowhere:Nothing", Capabilities(nbits=(4,)))]
