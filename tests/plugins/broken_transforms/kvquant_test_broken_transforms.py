"""Declarations of transforms with one mistake each."""

from types import SimpleNamespace

from kvquant.plugin import BackendSpec, Capabilities, TransformSpec, hookimpl


def declaring(*specs):
    return SimpleNamespace(kvquant_transforms=hookimpl(lambda: list(specs)))


def _raises():
    raise RuntimeError("no transforms today")


def _transform(name, **fields):
    return TransformSpec(name, "nowhere:Nothing", **fields)


raises = SimpleNamespace(kvquant_transforms=hookimpl(_raises))
misspelt = SimpleNamespace(kvquant_transform=hookimpl(lambda: [_transform("misspelt")]))
undecorated = SimpleNamespace(kvquant_transforms=lambda: [_transform("undecorated")])
signature = SimpleNamespace(kvquant_transforms=hookimpl(lambda registry: []))
wrong_return = SimpleNamespace(kvquant_transforms=hookimpl(lambda: _transform("wrong-return")))
lists_backend = declaring(BackendSpec("lists-backend", "nowhere:Nothing", Capabilities(nbits=(4,))))
other_name = declaring(_transform("another"))
bad_spec = declaring(TransformSpec("bad-spec", "nowhere.Nothing", summary=None))
newer = declaring(_transform("newer", api_version=1000))
