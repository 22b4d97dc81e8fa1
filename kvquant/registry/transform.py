"""A transform as the rest of kvquant sees it."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant.errors import HeadDimError, TransformContractError, TransformFactoryError, TransformImportError
from kvquant.plugin.transform import Transform, TransformSpec
from kvquant.registry.found import Found
from kvquant.registry.guard import PluginError, message_of


@dataclass(frozen=True)
class TransformPlugin(Found[TransformSpec]):
    """A transform, whether or not it can be used.

    Attributes:
        name: what users write, in lower case.
        distribution: name of the distribution that brings it, or ``"in-process"``.
        version: version of that distribution, or an empty string.
        availability: whether it can be used, and if not why and what to do.
        spec: its declaration; None where it could not be had (broken, incompatible) or was not wanted (blocked).
    """

    import_error = TransformImportError

    def create(self, head_dim: int) -> Transform:
        """Import the transform's factory, with whatever library is behind it, and make one for heads of that size.

        Args:
            head_dim: channels of a head.

        Raises:
            TransformUnavailableError: the transform cannot be used.
            TransformImportError: its factory, or a library that it needs, failed to import.
            HeadDimError: it cannot do heads of that size.
            TransformFactoryError: its factory raised something other than a ValueError.
            TransformContractError: its factory returned something that is no transform.
        """
        try:
            transform = self._made(head_dim)
        except PluginError as error:
            cause = error.__cause__
            if isinstance(cause, ValueError):
                # Without a message, the type is all that is known.
                raise HeadDimError(self.name, head_dim, message_of(cause) or error.problem) from cause
            raise TransformFactoryError(self.name, self.distribution, self.version, head_dim, error.problem) from cause
        if not isinstance(transform, Transform):
            kind = type(transform).__name__
            raise TransformContractError(
                self.name, f"its factory returned a {kind} without the methods apply, undo and apply_to_query"
            )
        return transform
