"""The public contract between kvquant and its plugins: all that a plugin may import.

A backend is a distribution with one entry point in the group ``kvquant.backends``. The entry point's name is the
backend's name and its value is a light module (no torch at import) with one hook::

    from kvquant.plugin import BackendSpec, Capabilities, hookimpl

    @hookimpl
    def kvquant_register_backends():
        return [BackendSpec("mine", "my_package.quantizer:MyQuantizer", Capabilities(nbits=(2, 4)))]

``MyQuantizer(scheme)`` is a `Quantizer`: it turns rows of numbers into codes and scales. Axes, grouping, packing,
append, crop, beams, save and load and attention belong to the core, for every backend alike.

A transform, which maps the channels of a head before they are quantised by whatever backend, is the same in the group
``kvquant.transforms``::

    from kvquant.plugin import TransformSpec, hookimpl

    @hookimpl
    def kvquant_transforms():
        return [TransformSpec("mine", "my_package.transform:MyTransform")]

``MyTransform(head_dim)`` is a `Transform`.
"""

from kvquant.plugin.capabilities import Capabilities
from kvquant.plugin.hookspecs import API_VERSION, hookimpl
from kvquant.plugin.quantizer import Opaque, QuantizedRows, Quantizer
from kvquant.plugin.spec import BackendSpec, Requirement, Scheme
from kvquant.plugin.transform import Transform, TransformSpec

__all__ = [
    "API_VERSION",
    "BackendSpec",
    "Capabilities",
    "Opaque",
    "QuantizedRows",
    "Quantizer",
    "Requirement",
    "Scheme",
    "Transform",
    "TransformSpec",
    "hookimpl",
]
