"""The small folder that blocks and notebook run in."""

import json
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user of the docs has: two checkpoints, a little data, the runs of a demo."""
    import pyarrow.parquet as pq

    from kd_bench.world.build import WEIGHTS, resolve

    folder = tmp_path_factory.mktemp("docs")
    for name in ("teacher", "student"):
        shutil.copytree(WEIGHTS / name, folder / "checkpoints" / name)
    train = resolve("embedded:data/train")
    rows = json.loads((train / "conversations.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if isinstance(row.get("image"), str)][:16]
    rows = [{**row, "image": row["image"].removeprefix("images/")} for row in rows]
    (folder / "data").mkdir()
    (folder / "data" / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "data" / "images").symlink_to(train / "images")
    test = resolve("embedded:data/test")
    for path in sorted(test.glob("*/*.parquet")):
        target = folder / "data" / "benchmarks" / path.relative_to(test)
        target.parent.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(path)
        pq.write_table(table if path.parent.name.endswith("_images") else table.slice(0, 8), target)
    shutil.copytree(ROOT / "results" / "example", folder / "results" / "example")
    return folder
