"""Compile what `attend_body` would launch for a GPU that is not here: ``python compile_triton.py CAPABILITY``.

The arguments are those of real calls, on tensors in host memory; only the launch is replaced.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kvquant
from kvquant.attention import triton_device, triton_kernels
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.plugin import BackendSpec, Capabilities
from kvquant.plugin.capabilities import TRELLIS_WIDTHS
from tests.support import FORMATS

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: Shared memory that the smallest of the GPUs with bfloat16 tensor cores gives a program (capability 8.6 and 8.9).
SHARED_MEMORY = 99 * 1024

#: ``(format, axes, bits, group size, head dims, ratio, query tokens, mask)``; every other one has outliers,
#: every third one a cap.
CASES = [
    ("affine", ("channel", "token"), (4, 4), 64, (128, 128), 4, 1, None),
    ("affine", ("token", "channel"), (3, 8), 16, (80, 96), 1, 1, torch.bool),
    ("affine", ("channel", "token"), (1, 2), 8, (64, 256), 8, 16, torch.bfloat16),
    ("codebook", ("channel", "token"), (4, 3), 64, (256, 256), 4, 5, None),
    ("codebook", ("token", "channel"), (2, 8), 16, (112, 32), 4, 2, torch.float32),
    ("affine", ("channel", "token"), (2.5, 3.5), 32, (64, 128), 4, 1, None),
    ("codebook", ("token", "channel"), (2.5, 1.5), 16, (128, 96), 4, 1, None),
    ("trellis", ("channel", "token"), (3, 1), 8, (80, 96), 2, 1, torch.bool),
    ("trellis", ("token", "channel"), (1, 2), 32, (64, 256), 8, 4, None),
    ("trellis", ("channel", "token"), (3, 3), 64, (256, 256), 8, 4, None),
    ("trellis", ("channel", "token"), (2, 3), 64, (128, 128), 4, 1, None),
]


class Compiled:
    """Stands for a kernel: compiles it where it would be launched."""

    def __init__(self, kernel, capability):
        self.kernel, self.target = kernel, GPUTarget("cuda", capability, 32)

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, **constants):
        named = {**dict(zip(self.kernel.arg_names, args, strict=False)), **constants}
        types, compiled_for, hints = {}, {}, {}
        for at, (parameter, (name, value)) in enumerate(zip(self.kernel.params, named.items(), strict=True)):
            if isinstance(value, torch.Tensor):
                types[name] = TYPES[value.dtype]
                if not parameter.do_not_specialize:
                    hints[(at,)] = [["tt.divisibility", 16]]
            elif value is None or name in constants:
                types[name], compiled_for[name] = "constexpr", value
            else:
                types[name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:  # what triton asks of integers at a launch
                    hints[(at,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, types, compiled_for, hints)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=self.target, options=options)
        assert made.metadata.shared <= SHARED_MEMORY, f"{made.metadata.shared} bytes of shared memory"
        print("compiled", self.kernel.__name__, len(made.asm["cubin"]), "bytes, shared", made.metadata.shared)


def main(capability):
    for kind, factory in FORMATS.items():
        widths = TRELLIS_WIDTHS if kind == "trellis" else (1, 2, 3, 4, 8)
        kvquant.register(BackendSpec(f"test-{kind}", factory, Capabilities(nbits=widths, formats=(kind,))))
    for name in ("attend_split", "merge_splits"):
        setattr(triton_device, name, Compiled(getattr(triton_device, name), capability))
    for at, (kind, axes, bits, group_size, widths, ratio, queries, mask) in enumerate(CASES):
        options = {"axis_key": axes[0], "axis_value": axes[1], "nbits_key": bits[0], "nbits_value": bits[1]}
        config = CacheConfig(
            backend=f"test-{kind}", group_size=group_size, residual_length=8, outlier_share=at % 2 / 10, **options
        )
        layer = QuantizedLayer(config, 0)
        layer.update(*(torch.randn(2, 2, 700, width) for width in widths))
        keys, values = (store.body for store in layer.stores)
        query = torch.randn(2, 2, ratio * queries, widths[0])
        shown = None if mask is None else torch.ones(2, 1, 1, queries, len(keys)).to(mask)
        last = torch.full((queries, 1), 600) if queries > 1 else None
        shift, cap = (torch.randn(query.shape[:3]), 30.0) if at % 3 == 0 else (None, None)
        triton_kernels.attend_body(query, keys, values, shown, last, cap, shift)


if __name__ == "__main__":
    main(int(sys.argv[1]))
