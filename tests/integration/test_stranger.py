"""What a user does with a stranger's plugin: install it with pip, use it by name, uninstall it.

kvquant and all plugins are wheels in an environment of their own, and every test runs the commands there.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import kvquant
from kvquant.plugin import API_VERSION
from tests.integration.environment import LIBRARIES, build_wheels

pytestmark = pytest.mark.slow

#: The shipped model, and prompts for it: 40 words, and a continuation.
PRELUDE = """
import json, torch, kvquant
from transformers import AutoModelForCausalLM, AutoTokenizer
from kvquant.attention.counters import counters
from kvquant.demo import MODEL_DIR
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
prompt, more, other = (
    tokenizer(text, return_tensors="pt").input_ids
    for text in ("The function returns a list of items. " * 40, " If the list is empty", " Raises an error that")
)
prompt = prompt[:, :240]
make = lambda: kvquant.QuantizedCache(backend="lloyd", nbits=4, group_size=64, residual_length=32)
"""

GENERATE = """
cache = make()
counters.reset()
out = model.generate(prompt, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False)
report = cache.memory_report()
print(json.dumps({
    "new": out.shape[1] - prompt.shape[1],
    "fused": counters.fused,
    "materialised": counters.materialised,
    "layers": len(report.layers),
    "quantised": [layer.quantized_tokens for layer in report.layers],
    "bits": cache.bits_per_element,
}))
"""

CROP = """
def fed(cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits

straight = make()
fed(straight, prompt)
expected = fed(straight, more)

cropped = make()
fed(cropped, prompt)
fed(cropped, other)
cropped.crop(-other.shape[1])
found = fed(cropped, more)

before = [layer.keys.clone() for layer in cropped.layers]
cropped.crop(-100)  # into the quantised body
after = [layer.keys.clone() for layer in cropped.layers]
length = cropped.get_seq_length()
fed(cropped, more)
print(json.dumps({
    "same": torch.equal(found, expected),
    "kept": all(torch.equal(old[:, :, :-100], new) for old, new in zip(before, after)),
    "length": length,
    "expected": prompt.shape[1] + more.shape[1] - 100,
    "continued": cropped.get_seq_length() - length == more.shape[1],
}))
"""

MAKE = """
import json, kvquant
outcomes = {{}}
for name in {!r}:
    try:
        kvquant.QuantizedCache(backend=name)
    except Exception as error:
        outcomes[name] = [type(error).__name__, str(error)]
    else:
        outcomes[name] = ["fine", ""]
print(json.dumps(outcomes))
"""

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "{version}"
dependencies = ["kvquant"]

[project.entry-points."kvquant.backends"]
{backend} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""

WORKING = """
from kvquant.plugin import BackendSpec, Capabilities, hookimpl

@hookimpl
def kvquant_register_backends():
    factory = "kvquant_plugins.reference:ReferenceQuantizer"
    return [BackendSpec({backend!r}, factory, Capabilities(nbits=(4,)), api_version={api})]
"""


@pytest.fixture(scope="module")
def lloyd(environment):
    """The environment with the example plugin, which pip found by its name."""
    with environment.installed("kvquant-plugin-lloyd"):
        yield environment


@pytest.fixture(scope="module")
def troubled(lloyd, tmp_path_factory):
    """The environment with wheels of plugins that bring trouble at hand, and the example plugin installed."""
    folder = tmp_path_factory.mktemp("projects")
    newer, current = (WORKING.format(backend="{}", api=api) for api in (API_VERSION + 1, API_VERSION))
    sources = [
        _project(folder, "kvquant-plugin-broken", "broken", "import a_library_that_is_not_there\n"),
        _project(folder, "kvquant-plugin-newer", "newer", newer.replace("'{}'", "'newer'")),
        _project(folder, "kvquant-plugin-twin-a", "twin", current.replace("'{}'", "'twin'")),
        _project(folder, "kvquant-plugin-twin-b", "twin", current.replace("'{}'", "'twin'"), version="2.0"),
    ]
    build_wheels(lloyd.wheels, *sources)
    return lloyd


def _project(parent: Path, distribution: str, backend: str, code: str, version: str = "1.0") -> Path:
    """Write the sources of a plugin: metadata and one module."""
    folder = parent / distribution
    folder.mkdir()
    module = distribution.replace("-", "_")
    text = PROJECT.format(distribution=distribution, backend=backend, module=module, version=version)
    (folder / "pyproject.toml").write_text(text)
    (folder / f"{module}.py").write_text(code)
    return folder


def test_the_kvquant_under_test_is_the_wheel_s(environment):
    """Not the sources that this test belongs to."""
    where = environment.python(
        "import json, kvquant, kvquant_plugins as p; print(json.dumps([kvquant.__file__, p.__file__]))"
    )
    assert all(Path(path).is_relative_to(environment.root) for path in where)
    assert environment.run("kvquant", "--version") == f"kvquant {kvquant.__version__}\n"


def test_an_installed_plugin_is_listed(lloyd):
    """In the table that users see, with its distribution."""
    (row,) = [line.split() for line in lloyd.run("kvquant", "list-backends").splitlines() if line.startswith("lloyd ")]
    assert row[:4] == ["lloyd", "0.1.0", "kvquant-plugin-lloyd", "yes"]
    assert row[-1] == "codebook"
    assert "Lloyd-Max" in lloyd.run("kvquant", "info", "lloyd")


def test_it_generates_with_fused_attention(lloyd):
    """Every decode step reads packed codes in every layer, and nothing is materialised; the plugin knows of neither."""
    found = lloyd.python(PRELUDE + GENERATE)
    assert found["new"] == 12
    assert found["fused"] == 11 * found["layers"] > 0
    assert found["materialised"] == 0
    assert found["quantised"] == [192] * found["layers"]
    assert found["bits"] == pytest.approx(4.25, abs=0.05)  # a scale of 16 bits for 64 numbers; the table is shared


def test_crop_works(lloyd):
    """Tokens cropped from the window leave the cache as if never seen; a deeper crop keeps what was stored."""
    found = lloyd.python(PRELUDE + CROP)
    assert found["same"]
    assert found["kept"]
    assert found["length"] == found["expected"]
    assert found["continued"]


def test_uninstalled_it_is_gone(lloyd):
    """From the list, and as a name."""
    lloyd.pip("uninstall", "--yes", "kvquant-plugin-lloyd")
    try:
        assert "lloyd" not in lloyd.backends()
        kind, message = lloyd.python(MAKE.format(["lloyd"]))["lloyd"]
        assert kind == "UnknownBackendError"
        assert message.startswith(
            "unknown backend 'lloyd'. Did you mean 'lloydmax'? "
            "Installed: bitsandbytes, hqq, lloydmax, quanto, reference, trellis."
        )
    finally:
        lloyd.pip("install", "kvquant-plugin-lloyd")


def test_a_plugin_that_is_broken_at_import_takes_nothing_down(troubled):
    """It is listed with the reason and what to do, refused with the same words, and gone once uninstalled."""
    reason = "its plugin fails to load: ModuleNotFoundError: No module named 'a_library_that_is_not_there'"
    with troubled.installed("kvquant-plugin-broken"):
        (broken,) = _listed(troubled, "broken")
        assert (broken["available"], broken["status"], broken["reason"]) == (False, "broken", reason)
        assert broken["hint"] == "upgrade kvquant-plugin-broken, or report this to its author"
        made = troubled.python(MAKE.format(["broken", "lloyd"]))
        kind, message = made["broken"]
        assert kind == "BrokenBackendError"
        assert message.startswith(f"backend 'broken', from kvquant-plugin-broken 1.0, cannot be used: {reason}.")
        assert made["lloyd"][0] == "fine"
    assert "broken" not in troubled.backends()


def test_a_plugin_for_a_newer_api_takes_nothing_down(troubled):
    """It is listed as incompatible, with both versions and what to upgrade, and gone once uninstalled."""
    with troubled.installed("kvquant-plugin-newer"):
        (newer,) = _listed(troubled, "newer")
        assert (newer["available"], newer["status"], newer["hint"]) == (False, "incompatible", "upgrade kvquant")
        versions = f"version {API_VERSION + 1} of the plugin API, and this kvquant has version {API_VERSION}"
        assert newer["reason"] == f"it was written for {versions}"
        made = troubled.python(MAKE.format(["newer", "lloyd"]))
        assert (made["newer"][0], made["lloyd"][0]) == ("IncompatibleBackendError", "fine")
    assert "newer" not in troubled.backends()


def test_two_plugins_of_one_name_are_told_apart(troubled):
    """Neither wins: both are listed, the name alone is refused, and with its distribution each can be used."""
    choice = "choose one by writing 'kvquant-plugin-twin-a:twin' or 'kvquant-plugin-twin-b:twin'"
    with troubled.installed("kvquant-plugin-twin-a", "kvquant-plugin-twin-b"):
        twins = _listed(troubled, "twin")
        assert [twin["distribution"] for twin in twins] == ["kvquant-plugin-twin-a", "kvquant-plugin-twin-b"]
        assert {(twin["status"], twin["hint"]) for twin in twins} == {("duplicate", choice)}
        made = troubled.python(MAKE.format(["twin", "kvquant-plugin-twin-b:twin", "lloyd"]))
        kind, message = made["twin"]
        assert kind == "DuplicateBackendError"
        assert message.endswith(f"Next step: {choice}")
        assert made["kvquant-plugin-twin-b:twin"][0] == made["lloyd"][0] == "fine"
    assert "twin" not in troubled.backends()


def test_with_one_of_two_uninstalled_the_name_is_the_other_s(troubled):
    """Without a word of the first."""
    with troubled.installed("kvquant-plugin-twin-a", "kvquant-plugin-twin-b"):
        troubled.pip("uninstall", "--yes", "kvquant-plugin-twin-a")
        (twin,) = troubled.backends()["twin"]
        assert (twin["distribution"], twin["version"], twin["status"]) == ("kvquant-plugin-twin-b", "2.0", "ok")


def _listed(environment, name) -> list[dict[str, Any]]:
    """Return what is listed of a backend, once others are seen to be available beside it."""
    found = environment.backends()
    assert found["reference"][0]["available"]
    assert found["lloyd"][0]["available"]
    return found[name]


def test_without_the_libraries_their_backends_say_what_to_do(environment):
    """Each is listed as missing with what it needs and the command that brings it, and refused with the same words."""
    found = environment.backends()
    made = environment.python(MAKE.format(["hqq", "quanto", "bitsandbytes"]))
    for name, distribution in zip(("hqq", "quanto", "bitsandbytes"), LIBRARIES, strict=True):
        (backend,) = found[name]
        assert (backend["available"], backend["status"]) == (False, "missing")
        assert backend["reason"].startswith(f"it needs {distribution}>=")
        assert backend["reason"].endswith(" (not installed)")
        assert backend["hint"] == f"pip install 'kvquant[{name}]'"
        kind, message = made[name]
        assert kind == "MissingRequirementError"
        assert message.endswith(f"{backend['reason']}. Next step: {backend['hint']}")
    assert "Next step: pip install 'kvquant[hqq]'\n" in environment.run("kvquant", "list-backends")
    assert found["reference"][0]["available"]


def test_with_the_libraries_all_are_available(environment):
    """As in the full environment of a user."""
    with environment.libraries():
        found = environment.backends()
        for name in ("reference", "lloydmax", "trellis", "hqq", "quanto", "bitsandbytes"):
            assert [backend["status"] for backend in found[name]] == ["ok"], found[name]


def test_a_backend_of_the_list_quantises_once_its_library_is_there(environment):
    """The library is the real one."""
    script = (
        "import json, torch, kvquant; states = torch.randn(1, 1, 300, 64)\n"
        "cache = kvquant.QuantizedCache('quanto', nbits=4); cache.update(states, states, 0)\n"
        "print(json.dumps(float((cache.layers[0].keys - states).abs().max())))"
    )
    with environment.libraries():
        assert 0 < environment.python(script) < 0.5


def test_pip_knows_what_a_plugin_needs(lloyd):
    """Its metadata names kvquant, and pip finds nothing amiss between them."""
    assert "Requires: kvquant\n" in lloyd.pip("show", "kvquant-plugin-lloyd")
    listed = {package["name"]: package["version"] for package in json.loads(lloyd.pip("list", "--format", "json"))}
    assert listed["kvquant"] == kvquant.__version__
