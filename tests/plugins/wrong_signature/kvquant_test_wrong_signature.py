"""A plugin whose hook wants something that kvquant does not give."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends(registry):
    return [BackendSpec("wrong-signature", "nowhere:Nothing", Capabilities(nbits=(4,)))]
