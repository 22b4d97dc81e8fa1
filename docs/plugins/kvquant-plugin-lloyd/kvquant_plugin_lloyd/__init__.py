"""What the backend lloyd can do. Listing backends reads this file, so it imports no torch."""

from kvquant.plugin import BackendSpec, Capabilities, hookimpl


@hookimpl
def kvquant_register_backends() -> list[BackendSpec]:
    """Declare the backend."""
    return [
        BackendSpec(
            name="lloyd",
            factory="kvquant_plugin_lloyd.quantizer:LloydQuantizer",
            capabilities=Capabilities(
                nbits=(1, 2, 3, 4),
                formats=("codebook",),
                options={"scale": "fit (smallest squared error; the default) or rms (the row's root mean square)"},
            ),
            summary="Lloyd-Max: the levels with the smallest squared error for normal numbers",
            url="https://doi.org/10.1109/TIT.1982.1056489",
            api_version=1,  # the version of kvquant's plugin API that this is written for
        )
    ]
