"""Does nothing of use; tests look at what it was made with."""


class HalvingQuantizer:
    def __init__(self, scheme):
        self.scheme = scheme

    def quantize(self, rows):
        return rows
