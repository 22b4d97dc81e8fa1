"""States that do not fit, plugins that fail on them, and models and libraries that cannot be loaded."""

from __future__ import annotations

from kvquant.errors.base import KVQuantError


class StatesError(KVQuantError, ValueError):
    """Key or value states that do not fit; nothing was stored.

    Attributes:
        where: ``"layer 3"``, or an empty string when the layer is not known.
        problem: what is wrong with them.
    """

    def __init__(self, problem: str, where: str = "") -> None:
        self.problem, self.where = problem, where
        super().__init__(f"{where + ': ' if where else ''}{problem}; nothing was stored.")


class NonFiniteStatesError(StatesError):
    """NaN or infinity among the states that were about to be quantised.

    Attributes:
        stream: ``"key"`` or ``"value"``.
        start, stop: the range of tokens, counted from the start of the sequence, in which they are.
    """

    def __init__(self, stream: str, start: int, stop: int, where: str = "") -> None:
        self.stream, self.start, self.stop = stream, start, stop
        super().__init__(
            f"{stream} states hold NaN or infinity among tokens {start} to {stop - 1} "
            "(check_finite=False switches this check off)",
            where,
        )


class CacheFullError(StatesError):
    """More states than a cache of fixed size has room for; nothing was stored.

    Attributes:
        max_cache_len: tokens that it has room for.
        length: tokens that it holds.
        added: tokens that were to come.
    """

    def __init__(self, max_cache_len: int, length: int, added: int, where: str = "") -> None:
        self.max_cache_len, self.length, self.added = max_cache_len, length, added
        super().__init__(
            f"max_cache_len={max_cache_len} leaves no room for {added} more tokens beside the {length} that the cache "
            f"holds; it counts prompt and new tokens together, and {length + added} would do",
            where,
        )


class OutOfStepError(KVQuantError, RuntimeError):
    """A compiled graph counts other tokens than a layer of the cache holds: an earlier step has failed half-way.

    Attributes:
        counted: tokens by the graph's count.
        length: tokens that the layer holds.
        where: the layer, e.g. ``"layer 3"``.
    """

    def __init__(self, counted: int, length: int, where: str) -> None:
        self.counted, self.length, self.where = counted, length, where
        super().__init__(
            f"{where} holds {length} tokens where the compiled graph counted {counted}: an earlier step has failed "
            "half-way. cache.align_layers() mends the count."
        )


class GraphGradientError(KVQuantError, RuntimeError):
    """A backward pass through a compiled step."""

    def __init__(self) -> None:
        super().__init__(
            "a compiled step has no gradients through the cache. Run it without torch.compile, or, where none are "
            "wanted, under torch.no_grad()."
        )


class CropError(KVQuantError, ValueError):
    """A crop that cannot be done.

    Attributes:
        requested: the argument of `crop`.
        length: tokens in the cache.
        reason: what stands in the way, where it is neither sign nor length.
    """

    def __init__(self, requested: object, length: int, reason: str = "") -> None:
        self.requested, self.length, self.reason = requested, length, reason
        if reason:
            problem = reason
        elif not isinstance(requested, int):
            problem = "crop takes a whole number of tokens, for example crop(-5)"
        elif requested > 0:
            problem = f"crop takes the number of tokens to remove as a negative number, for example crop(-{requested})"
        else:
            problem = f"the cache holds only {length} tokens; at most crop({-length}) is possible"
        super().__init__(f"crop({requested}): {problem}. Nothing was removed.")


class QuantizationError(KVQuantError, RuntimeError):
    """A backend raised while it quantised or dequantised; its own error is the `__cause__`.

    Attributes:
        backend: the backend's name.
        stream: ``"key"`` or ``"value"``.
        start, stop: the tokens of the block, counted from the start of the sequence.
        where: the layer, e.g. ``"layer 3"``.
    """

    def __init__(self, backend: str, stream: str, start: int, stop: int, cause: Exception, where: str = "") -> None:
        self.backend, self.stream, self.start, self.stop, self.where = backend, stream, start, stop, where
        place = f"{where}, " if where else ""
        super().__init__(
            f"backend {backend!r} failed on {place}{stream} states of tokens {start} to {stop - 1}: "
            f"{type(cause).__name__}: {cause}. The cache holds every token that it held before."
        )


class BackendContractError(KVQuantError, TypeError):
    """A backend returned something other than the plugin contract promises.

    Attributes:
        backend: the backend's name.
        problem: what is wrong with what it returned.
    """

    def __init__(self, backend: str, problem: str) -> None:
        self.backend, self.problem = backend, problem
        super().__init__(
            f"backend {backend!r} broke the plugin contract: {problem}. This is a bug in the plugin, not in your code."
        )


class StaleStatesError(KVQuantError, RuntimeError):
    """States were read after the cache that they stand for has changed.

    Attributes:
        stream: ``"key"`` or ``"value"``.
    """

    def __init__(self, stream: str) -> None:
        self.stream = stream
        super().__init__(
            f"these {stream} states stand for the cache as it was before its last change, and it keeps no history. "
            "Take a copy while they are fresh: states.clone()."
        )


class ReadOnlyStatesError(KVQuantError, RuntimeError):
    """States that stand for a quantised cache were written to.

    Attributes:
        operation: the name of the operation.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(
            f"{operation} would write into quantised states, which are read only. Work on a copy (states.clone()), "
            "and assign cache.layers[i].keys or .values to change the cache."
        )


class PendingAssignmentError(KVQuantError, RuntimeError):
    """Keys (or values) of another length were assigned, and their partner has not followed yet.

    Attributes:
        assigned: the stream that was assigned.
        length: its tokens.
        partner_length: tokens of the other stream.
    """

    def __init__(self, assigned: str, length: int, partner_length: int) -> None:
        self.assigned, self.length, self.partner_length = assigned, length, partner_length
        partner = {"key": "values", "value": "keys"}[assigned]
        super().__init__(
            f"the {assigned} states of this layer were assigned with {length} tokens, but its {partner} still hold "
            f"{partner_length}. Assign {partner} of {length} tokens first."
        )


class ModelLoadError(KVQuantError, OSError):
    """A model or its tokenizer could not be loaded; the library's own error is the `__cause__`.

    Attributes:
        name: the name or path given.
    """

    def __init__(self, name: str, cause: Exception) -> None:
        self.name = name
        first = str(cause).strip().partition("\n")[0]
        super().__init__(
            f"cannot load the model {name!r}: {first} Give the folder of a saved model, or the name of one on the hub."
        )


class MissingExtraError(KVQuantError, ImportError):
    """A library that a command needs, and that only an extra of kvquant brings.

    Attributes:
        name: the library.
        command: what brings it.
    """

    def __init__(self, name: str, command: str) -> None:
        self.command = command
        super().__init__(f"this needs {name}, which is not installed. Run: {command}", name=name)
