"""A plugin that forgot the decorator of its hook."""

from kvquant.plugin import BackendSpec, Capabilities


def kvquant_register_backends():
    return [BackendSpec("undecorated-hook", "nowhere:Nothing", Capabilities(nbits=(4,)))]
