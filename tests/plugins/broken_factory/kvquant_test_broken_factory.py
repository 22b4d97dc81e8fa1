"""Plugins that load well, and fail when they are used."""

import sys

from kvquant.plugin import BackendSpec, Capabilities, hookimpl

HERE = "kvquant_test_broken_factory"


class Something:
    def quantize(self, rows):
        return rows


def late_import(scheme):
    import a_library_that_is_not_there  # noqa: F401


def refuse(scheme):
    raise ValueError(f"no way with {scheme.nbits} bits")


def no_quantizer(scheme):
    return object()


def no_dequantize(scheme):
    return Something()


def leave(scheme):
    sys.exit(1)


@hookimpl
def kvquant_register_backends():
    factories = {
        "no-module": "kvquant_test_broken_factory_library:Quantizer",
        "no-class": f"{HERE}:Missing",
        "late-import": f"{HERE}:late_import",
        "refuses": f"{HERE}:refuse",
        "no-quantizer": f"{HERE}:no_quantizer",
        "no-dequantize": f"{HERE}:no_dequantize",
        "exits": f"{HERE}:leave",
    }
    opaque = Capabilities(nbits=(4,), formats=("opaque",))
    affine = Capabilities(nbits=(4,))
    return [
        BackendSpec(name, factory, opaque if name == "no-dequantize" else affine) for name, factory in factories.items()
    ]
