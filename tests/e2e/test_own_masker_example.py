"""The example of a masker of one's own: served, it answers as in process."""

import re

from tests.adapters.test_examples import run


def test_own_masker_is_served() -> None:
    output = run("examples.serve_own_masker", "--characters", "2000")
    lines = re.findall(r"^(in process|served), density ([\d.]+): (.*)$", output, re.MULTILINE)
    assert [line[0] for line in lines] == ["in process", "served"]
    assert lines[0][1:] == lines[1][1:]
    assert 0.4 < float(lines[0][1]) < 0.7
