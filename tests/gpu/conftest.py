"""These tests need a CUDA device; where there is none they are not collected, and CI has none."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
