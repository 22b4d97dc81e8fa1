"""A plugin whose library is installed in a version that is too old."""

from kvquant.plugin import BackendSpec, Capabilities, Requirement, hookimpl


@hookimpl
def kvquant_register_backends():
    return [
        BackendSpec(
            "outdated-requirement",
            "nowhere:Nothing",
            Capabilities(nbits=(4,)),
            requires=(Requirement("kvquant-old-library", "2.0"),),
        )
    ]
