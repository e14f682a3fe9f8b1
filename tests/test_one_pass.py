"""experiments/one_pass.py measures what a memory keeps."""
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / 'experiments' / 'one_pass.py'
SPEC = importlib.util.spec_from_file_location('one_pass', PATH)
one_pass = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(one_pass)


@pytest.mark.parametrize('name', one_pass.MEMORIES)
def test_error_left(name):
    """All memories have as large a state. More passes leave less, more pairs leave more."""
    options = one_pass.MEMORIES[name]
    left = {(n, passes): one_pass.error_left(options, n, passes, 0.4)
            for n, passes in ((8, 1), (8, 4), (32, 1))}
    assert 0 < left[8, 4] < left[8, 1] < left[32, 1] < 1


def test_a_step_of_one_half_keeps_one_pair():
    left = one_pass.error_left(one_pass.MEMORIES['linear, 2 heads of 64'], 1, 1, 0.5)
    assert left < 1e-10
