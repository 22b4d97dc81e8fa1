"""A plugin with a library, an option and a step of its own, as it should be: the conformance kit has nothing to say."""

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Requirement, hookimpl


class Symmetric:
    def __init__(self, scheme):
        import hypothesis  # noqa: F401

        self.ends = scheme.options.get("ends", "closed")
        if self.ends not in ("closed", "open"):
            raise ValueError(f"ends={self.ends!r} is not supported; supported: closed, open")
        self.levels = 2**scheme.nbits - 1

    def quantize(self, rows):
        import torch

        numbers = rows.float()
        reach = numbers.abs().amax(1).clamp(max=torch.finfo(torch.float32).max / 4)
        if self.ends == "open":
            reach = reach * (1 - 0.5 / (self.levels + 1))
        scale = reach * (2 / self.levels)
        codes = (numbers + reach[:, None]) / scale.where(scale > 0, 1)[:, None]
        return QuantizedRows(codes.round().clamp(0, self.levels).to(torch.uint8), scale, -reach)


@hookimpl
def kvquant_register_backends():
    return [
        BackendSpec(
            "careful",
            "kvquant_test_careful:Symmetric",
            Capabilities(nbits=(2, 4), dtypes=("float32", "float16"), options={"ends": "closed (default) or open"}),
            requires=(Requirement("hypothesis"),),
            install_hint="pip install hypothesis",
        )
    ]
