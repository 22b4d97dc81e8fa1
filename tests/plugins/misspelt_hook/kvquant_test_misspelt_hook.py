"""A plugin with a letter too few in the name of its hook."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backend():
    return [BackendSpec("misspelt-hook", "nowhere:Nothing", Capabilities(nbits=(4,)))]
