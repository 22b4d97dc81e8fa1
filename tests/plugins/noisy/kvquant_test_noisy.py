"""A plugin that prints while it is imported."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl

print("noise on standard output")


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("noisy", "nowhere:Nothing", Capabilities(nbits=(4,)), summary="loud\x1b[2J and clear")]
