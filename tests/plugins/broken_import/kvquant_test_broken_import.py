"""A plugin that imports its library too early."""

import a_library_that_is_not_there  # noqa: F401
