"""All checks, in the order in which they run: basic ones first, because others rest on them."""

from __future__ import annotations

from kvquant.testing.check import Check
from kvquant.testing.checks import accuracy, contract, imports, independence, use

CHECKS: tuple[Check, ...] = (
    imports.light_listing,
    imports.requirements,
    imports.missing_library,
    contract.creates,
    contract.shapes,
    contract.code_range,
    contract.devices,
    contract.refusals,
    contract.options,
    accuracy.nearest_level,
    accuracy.error_bound,
    contract.bits,
    contract.opaque_reading,
    accuracy.constant,
    accuracy.zeros,
    accuracy.outliers,
    accuracy.tiny,
    accuracy.huge,
    accuracy.half_precision,
    independence.deterministic,
    independence.groups,
    independence.heads,
    independence.split,
    independence.many_rows,
    independence.stateless,
    contract.unshared,
    contract.surroundings,
    independence.untouched_input,
    independence.modes,
    independence.threads,
    use.cache,
    use.attention,
)
