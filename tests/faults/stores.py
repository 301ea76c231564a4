"""Stores of three models, damaged after they were written."""

from pathlib import Path

import pandas as pd
import pytest

from kd_bench.errors import IncompleteRunError
from tests.faults import fault
from tests.report_store import Model, add_run


@fault("results: bits flipped", tries=1500)
def a_flipped_bit_in_samples(folder: Path, number: int) -> None:
    run = add_run(folder, Model("student", "kd", "", 0.4), tasks=["pope"], units=5)
    path = run.path / "tasks" / "pope.samples.parquet"
    frame, data = run.samples("pope"), bytearray(path.read_bytes())
    place = (number * 7919) % (8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    with pytest.raises(IncompleteRunError, match=r"pope\.samples\.parquet"):
        pd.testing.assert_frame_equal(run.samples("pope"), frame)
