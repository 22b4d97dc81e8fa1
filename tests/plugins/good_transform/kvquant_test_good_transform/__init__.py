"""Transforms as they should be, and a backend of the name of one of them."""

from kvquant.plugin import BackendSpec, Capabilities, TransformSpec, hookimpl


@hookimpl
def kvquant_transforms():
    return [
        TransformSpec(
            "reverse",
            "kvquant_test_good_transform.transform:Reverse",
            summary="Channels in reverse order",
            url="https://example.org/reverse",
            api_version=1,
        ),
        TransformSpec("halves", "kvquant_test_good_transform.transform:Halves"),
    ]


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("reverse", "nowhere:Nothing", Capabilities(nbits=(4,)))]
