"""Has a name that another distribution has, too."""

from kvquant.plugin import TransformSpec, hookimpl


@hookimpl
def kvquant_transforms():
    return [TransformSpec("reverse", "nowhere:Nothing")]
