"""A plugin whose library is not installed."""

from kvquant.plugin import BackendSpec, Capabilities, Requirement, hookimpl


@hookimpl
def kvquant_register_backends():
    return [
        BackendSpec(
            "missing-requirement",
            "nowhere:Nothing",
            Capabilities(nbits=(4,)),
            requires=(
                Requirement("a-library-that-is-not-there", "2.0"),
                Requirement("pluggy", "1000"),
                Requirement("packaging"),
            ),
            install_hint="pip install 'kvquant-missing-requirement[library]'",
        )
    ]
