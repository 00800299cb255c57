"""Requests that cannot be answered are refused, and nothing else happens."""

import json

import pytest

from tests.serving.c_api import INVALID_ARGUMENT
from tests.serving.conftest import MAX_BATCH, ROOT, run_python
from tests.serving.malformed import KINDS, LARGEST
from tests.serving.malformed import MAX_BATCH as SENT_BATCH


@pytest.mark.slow
def test_a_thousand_malformed_requests_are_refused_and_good_ones_between_them_stay_the_same(exported):
    assert SENT_BATCH == MAX_BATCH
    report = json.loads(run_python("-m", "tests.serving.malformed", exported / "1", "1000", "0", cwd=ROOT))
    assert sum(report["codes"].values()) == 1000
    assert set(report["codes"]) == {f"{kind}: {INVALID_ARGUMENT}" for kind in KINDS}
    assert report["changed"] == 0
    assert report["grown"] < 4 * LARGEST * 8  # the request itself, twice while it is sent, and an isfinite of noise
