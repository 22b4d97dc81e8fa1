"""What makes a declaration impossible."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

import pytest

from kvquant.plugin import BackendSpec, Capabilities, Requirement
from kvquant.registry.validation import spec_problems

FINE = BackendSpec("mine", "package.module:Class", Capabilities(nbits=(4,)))

GOOD_FIELDS = [
    {"name": "a"},
    {"name": "half-quadratic_4.bit2"},
    {"factory": "m:Outer.Inner"},
    {"factory": lambda scheme: None},
    {"requires": (Requirement("torch", "2.6"), Requirement("hqq", "0.2.8.post1"), Requirement("x"))},
]
BAD_FIELDS = [
    ({"name": "Mine"}, "name='Mine' must be lower-case"),
    ({"name": ""}, "name='' must be"),
    ({"name": "a:b"}, "name='a:b' must be"),
    ({"name": "a--b"}, "name='a--b' must be"),
    ({"name": "-a"}, "name='-a' must be"),
    ({"name": "a\n"}, r"name='a\\n' must be"),
    ({"name": 4}, "name=4 must be"),
    ({"factory": "module.Class"}, "factory='module.Class' must be 'module:Class' or a callable"),
    ({"factory": "module:"}, "factory='module:' must be"),
    ({"factory": "a b:c"}, "factory='a b:c' must be"),
    ({"factory": None}, "factory=None must be"),
    ({"summary": None}, "summary=None must be a string"),
    ({"url": 1}, "url=1 must be a string"),
    ({"install_hint": b""}, "install_hint=b'' must be a string"),
    ({"api_version": "1"}, "api_version='1' must be an integer"),
    ({"api_version": True}, "api_version=True must be an integer"),
    ({"requires": ("torch",)}, r"requires=\('torch',\) must be a tuple of Requirement"),
    ({"requires": "torch"}, "requires='torch' must be a tuple of Requirement"),
    ({"requires": (Requirement("torch", "new"),)}, "requires: minimum='new' must be a version such as '1.2' or None"),
    ({"requires": (Requirement("torch", 2),)}, "requires: minimum=2 must be a version"),
    ({"requires": (Requirement(""),)}, "requires: distribution='' must be the name of a distribution"),
    ({"capabilities": {"nbits": (4,)}}, r"capabilities=\{'nbits': \(4,\)\} must be a Capabilities"),
]
GOOD_CAPABILITIES = [
    {"nbits": (1, 2, 3, 4, 8)},
    {"nbits": [2, 4]},
    {"axes": ("token",)},
    {"formats": ("affine", "codebook")},
    {"nbits": (1, 2, 3), "formats": ("trellis",)},
    {"nbits": (2, 4), "formats": ("codebook", "trellis")},
    {"group_sizes": (16,)},
    {"devices": ("cpu", "mps", "xpu")},
    {"options": MappingProxyType({"rounds": "how often"})},
    {"axis_aliases": {0: "channel", -1: "token"}},
]
BAD_CAPABILITIES = [
    ({"nbits": ()}, r"nbits=\(\) must be a tuple of one or more of 1, 2, 3, 4, 8"),
    ({"nbits": 4}, "nbits=4 must be"),
    ({"nbits": (5,)}, r"nbits=\(5,\) must be"),
    ({"nbits": (True,)}, r"nbits=\(True,\) must be"),
    ({"nbits": (4.0,)}, r"nbits=\(4.0,\) must be"),
    ({"nbits": ("4",)}, r"nbits=\('4',\) must be"),
    ({"axes": ("head",)}, r"axes=\('head',\) must be a tuple of one or more of channel, token"),
    ({"axes": "token"}, "axes='token' must be"),
    ({"formats": ("affine", "opaque")}, r"formats=\('affine', 'opaque'\): 'opaque' stands alone"),
    (
        {"formats": ("float",)},
        r"formats=\('float',\) must be a tuple of one or more of affine, codebook, trellis, opaque",
    ),
    ({"nbits": (2, 4), "formats": ("trellis",)}, r"nbits=\(2, 4\): codes of the format 'trellis' have one of 1, 2, 3"),
    ({"nbits": (8,), "formats": ["trellis", "trellis"]}, r"nbits=\(8,\): codes of the format 'trellis' have one of"),
    ({"dtypes": ("fp16",)}, r"dtypes=\('fp16',\) must be a tuple of one or more of float32, float16"),
    ({"devices": ("cuda:0",)}, r"devices=\('cuda:0',\) must be a tuple of torch device types such as 'cuda'"),
    ({"group_sizes": (0,)}, r"group_sizes=\(0,\) must be a tuple of positive integers, or None"),
    ({"group_sizes": ()}, r"group_sizes=\(\) must be"),
    ({"group_sizes": 64}, "group_sizes=64 must be"),
    ({"deterministic": "yes"}, "deterministic='yes' must be True or False"),
    ({"options": ("rounds",)}, r"options=\('rounds',\) must map option names to one line of help each"),
    ({"options": {"rounds": 3}}, r"options=\{'rounds': 3\} must map"),
    ({"axis_aliases": {"0": "channel"}}, r"axis_aliases=\{'0': 'channel'\} must map integers to 'channel' or 'token'"),
    ({"axis_aliases": {0: "head"}}, r"axis_aliases=\{0: 'head'\} must map"),
]


@pytest.mark.parametrize("fields", GOOD_FIELDS)
def test_a_good_declaration_has_no_problems(fields):
    """Everything that the contract allows is allowed."""
    assert spec_problems(replace(FINE, **fields)) == []


@pytest.mark.parametrize(("fields", "problem"), BAD_FIELDS)
def test_a_bad_declaration_is_told_what_is_wrong(fields, problem):
    """One sentence with field, value and what would work."""
    (found,) = spec_problems(replace(FINE, **fields))
    assert re.match(problem, found), found


@pytest.mark.parametrize("fields", GOOD_CAPABILITIES)
def test_good_capabilities_have_no_problems(fields):
    """Everything that the contract allows is allowed."""
    assert spec_problems(replace(FINE, capabilities=Capabilities(**{"nbits": (4,), **fields}))) == []


@pytest.mark.parametrize(("fields", "problem"), BAD_CAPABILITIES)
def test_bad_capabilities_are_told_what_is_wrong(fields, problem):
    """One sentence with field, value and what would work."""
    (found,) = spec_problems(replace(FINE, capabilities=Capabilities(**{"nbits": (4,), **fields})))
    assert re.match("capabilities." + problem, found), found
