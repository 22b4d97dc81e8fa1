"""Projects as `kvquant new-plugin` writes them, and the example plugin: installed, and tested by their own tests."""

import re
import shutil

import pytest

from kvquant.scaffold import FORMATS
from tests.integration.environment import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("format_", FORMATS)
def test_the_printed_steps_lead_to_a_backend_that_conforms(environment, format_, tmp_path):
    """Typed as they are printed: installed, all tests pass, the kit finds nothing, and the backend is in the list."""
    name = f"my-{format_}"
    printed = environment.run("kvquant", "new-plugin", name, "--format", format_, "--directory", tmp_path)
    steps = re.findall(r"^  (.*)$", printed.partition("Next steps:\n")[2], flags=re.MULTILINE)
    assert [step.split()[0] for step in steps] == ["cd", "pip", "pytest", "kvquant", "kvquant"]
    try:
        shown = environment.shell("\n".join(steps))
    finally:
        environment.pip("uninstall", "--yes", f"kvquant-plugin-{name}")
    assert re.search(r"= \d+ passed", shown)
    assert re.search(r"^\d+ passed, 0 failed", shown, flags=re.MULTILINE)
    assert re.search(rf"^{name} +0\.1\.0 +kvquant-plugin-{name} +yes .*{format_}", shown, flags=re.MULTILINE)


def test_the_example_plugin_passes_its_own_tests(environment, tmp_path):
    """The conformance kit's among them."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "docs" / "plugins" / "kvquant-plugin-lloyd", project)
    with environment.installed("kvquant-plugin-lloyd"):
        shown = environment.run("pytest", "-p", "no:cacheprovider", cwd=project)
    assert re.search(r"= \d+ passed", shown)
