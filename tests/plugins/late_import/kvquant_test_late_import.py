"""A plugin that imports its library when it quantises, in the middle of somebody's generation."""

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Requirement, hookimpl


class Sign:
    def __init__(self, scheme):
        pass

    def quantize(self, rows):
        import hypothesis  # noqa: F401

        low, high = rows.amin(1).float(), rows.amax(1).float()
        middle = low / 2 + high / 2
        return QuantizedRows((rows > middle[:, None]).byte(), (high - low).clamp(max=3e38), low)


@hookimpl
def kvquant_register_backends():
    return [
        BackendSpec(
            "late-import",
            "kvquant_test_late_import:Sign",
            Capabilities(nbits=(1,)),
            requires=(Requirement("hypothesis"),),
            install_hint="pip install hypothesis",
        )
    ]
