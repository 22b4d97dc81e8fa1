"""Signs that every process draws anew, and then keeps."""

import random

from kvquant.plugin import TransformSpec, hookimpl

SEED = random.SystemRandom().randrange(1 << 32)


class Signs:
    def __init__(self, head_dim):
        import torch

        self.signs = torch.randn(head_dim, generator=torch.Generator().manual_seed(SEED)).sign()

    def apply(self, states):
        return states * self.signs.to(states)

    undo = apply_to_query = apply


@hookimpl
def kvquant_transforms():
    return [TransformSpec("chance-transform", "kvquant_test_chance_transform:Signs")]
