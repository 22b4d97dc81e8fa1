"""Imports torch where it declares its transform."""

import torch

from kvquant.plugin import TransformSpec, hookimpl


class Negative:
    def __init__(self, head_dim):
        self.head_dim = head_dim

    def apply(self, states):
        return torch.neg(states)

    undo = apply_to_query = apply


@hookimpl
def kvquant_transforms():
    return [TransformSpec("heavy-transform", "kvquant_test_heavy_transform:Negative")]
