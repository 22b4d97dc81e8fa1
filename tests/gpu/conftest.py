"""These tests need a CUDA device; where there is none they are not collected, and CI has none."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    # Passed over, the kernels would look as if they had been tried on this device.
    raise pytest.UsageError("TRITON_INTERPRET=1 keeps kernels off the GPU: unset it to run tests/gpu")
