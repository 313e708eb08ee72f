"""The notebook runs, and what is stored in it came from one run."""

import json
import re

import pytest
from test_scripts import ROOT, run

NOTEBOOK = ROOT / "examples" / "guide.ipynb"


@pytest.fixture(scope="module")
def cells():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_cells_run_in_order(cells, tmp_path):
    """As a script, in an empty folder and with a smaller budget."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    code, count = re.subn(r"^steps = [\d_]+", "steps = 512", code, flags=re.MULTILINE)
    assert count == 1
    script = tmp_path / "guide.py"
    script.write_text(code)
    said = run(script, cwd=tmp_path, PYTHONPATH=str(ROOT), MPLBACKEND="agg")
    assert "mine.npz [" in said  # the last cell's
    assert len(list(tmp_path.glob("runs/*/comparison.png"))) == 1


def test_the_stored_outputs_are_of_one_run(cells):
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [x for x in outputs if x["output_type"] == "error" or x.get("name") == "stderr"]
    assert sum("image/png" in x.get("data", {}) for x in outputs) >= 3


def test_the_notebook_is_small_and_names_no_machine(cells):
    assert NOTEBOOK.stat().st_size < 300_000
    text = json.dumps([x.get("text") for cell in cells for x in cell["outputs"]])
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work)/", text)
