"""A plugin for an earlier version of the plugin API."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("older-api", "nowhere:Nothing", Capabilities(nbits=(4,)), api_version=0)]
