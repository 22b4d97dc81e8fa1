"""What kvquant asks of every backend, as its conformance kit checks it."""

from kvquant.testing import parametrize_checks


@parametrize_checks("lloyd")
def test_conforms(check):
    """One check of the kit; its name says which."""
    check()
