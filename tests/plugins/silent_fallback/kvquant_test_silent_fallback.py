"""A plugin that does something else, without a word, where its library cannot be imported."""

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Requirement, hookimpl


class Sign:
    def __init__(self, scheme):
        try:
            import hypothesis
        except ImportError:
            hypothesis = None
        self.exact = hypothesis is not None

    def quantize(self, rows):
        low, high = rows.amin(1).float(), rows.amax(1).float()
        middle = low / 2 + high / 2 if self.exact else 0 * low
        return QuantizedRows((rows > middle[:, None]).byte(), (high - low).clamp(max=3e38), low)


@hookimpl
def kvquant_register_backends():
    return [
        BackendSpec(
            "silent-fallback",
            "kvquant_test_silent_fallback:Sign",
            Capabilities(nbits=(1,)),
            requires=(Requirement("hypothesis"),),
            install_hint="pip install hypothesis",
        )
    ]
