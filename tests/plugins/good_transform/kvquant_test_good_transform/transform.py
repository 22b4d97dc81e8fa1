class Reverse:
    def __init__(self, head_dim):
        self.head_dim = head_dim

    def apply(self, states):
        return states.flip(-1)

    undo = apply_to_query = apply


class Halves:
    """Divides channels by two where keys are, and multiplies them where queries are."""

    def __init__(self, head_dim):
        if head_dim > 64:
            raise ValueError("at most 64 channels work")

    def apply(self, states):
        return states / 2

    def undo(self, states):
        return states * 2

    apply_to_query = undo
