"""New plugin projects, written from templates. Imports no torch."""

from kvquant.scaffold.names import Names, names_for
from kvquant.scaffold.project import new_project

__all__ = ["FORMATS", "Names", "names_for", "new_project"]

#: Formats that there is a quantiser to start from for.
FORMATS = ("affine", "codebook", "opaque")
