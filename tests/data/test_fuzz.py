import warnings

import pytest

from tests.data import fuzz


@pytest.mark.slow
def test_damaged_data_are_refused_soon_and_in_bounded_memory(tmp_path):
    """The full size is `python -m tests.data.fuzz`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, case in fuzz.cases(tmp_path).items():
            assert not fuzz.run(kind, case, tmp_path, first=10**6, count=case.full // 50)
