"""A plugin as it should be: one module that serves two names, and a quantizer that is imported when it is used."""

from kvquant.plugin import BackendSpec, Capabilities, Requirement, hookimpl

FACTORY = "kvquant_test_good.quantizer:HalvingQuantizer"


@hookimpl
def kvquant_register_backends():
    return [
        BackendSpec(
            "good",
            FACTORY,
            Capabilities(
                nbits=(2, 4),
                group_sizes=(32, 64),
                axis_aliases={0: "channel", -1: "token"},
                options={"rounds": "how often to look again"},
                deterministic=False,
            ),
            requires=(Requirement("pluggy", "1.0"),),
            summary="A plugin as it should be",
            url="https://example.org/good",
        ),
        BackendSpec("good-four", FACTORY, Capabilities(nbits=(4,), axes=("token",))),
    ]
