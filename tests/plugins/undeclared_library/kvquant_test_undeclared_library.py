"""A plugin that needs hypothesis, which happens to be installed here, and does not say so."""

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, hookimpl


class Sign:
    def __init__(self, scheme):
        import hypothesis

        self.version = hypothesis.__version__

    def quantize(self, rows):
        low, high = rows.amin(1).float(), rows.amax(1).float()
        middle = low / 2 + high / 2
        return QuantizedRows((rows > middle[:, None]).byte(), (high - low).clamp(max=3e38), low)


@hookimpl
def kvquant_register_backends():
    return [BackendSpec("undeclared-library", "kvquant_test_undeclared_library:Sign", Capabilities(nbits=(1,)))]
