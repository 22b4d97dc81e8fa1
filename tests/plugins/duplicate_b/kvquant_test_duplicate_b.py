"""One of two plugins with one name."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends():
    return [
        BackendSpec("twin", "kvquant_test_good.quantizer:HalvingQuantizer", Capabilities(nbits=(4,)), summary="twin b")
    ]
