"""docs/quickstart.ipynb: what it shows is what it gives. `python tests/test_notebook.py` writes its outputs anew."""

import re
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
_MEASURED = re.compile(r"[\d.]+ s\b|\d+ traces?\b( in)?|\(all remembered\)")
"""Times, and whether a plan was traced or recalled."""
_MACHINE = re.compile(r"(/(tmp|home|root|content|work|usr|opt)\b|ipykernel_|\bvenv\b|site-packages)[^\"\n]*")


def executed(folder: Path) -> Any:
    """The notebook as it is after a run in an empty folder, without what plays print to standard error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def shown(notebook: Any) -> list[tuple[str, str]]:
    """Kind and text of every output, without what differs from run to run."""
    found = []
    for output in (each for cell in notebook.cells if cell.cell_type == "code" for each in cell.outputs):
        for kind, text in sorted(({"text": output.text} if "text" in output else output.data).items()):
            found.append((kind, _MEASURED.sub("...", text)))
    return found


def test_its_outputs_name_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    texts = [text for _, text in shown(notebook)]
    assert [text for text in texts if _MACHINE.search(text)] == []
    assert sum(kind == "text/html" for kind, _ in shown(notebook)) == 4
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code"), "it was executed"


@pytest.mark.slow
def test_its_outputs_are_what_it_gives(own_cache: Path, tmp_path: Path) -> None:
    assert shown(executed(tmp_path)) == shown(nbformat.read(NOTEBOOK, as_version=4))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        nbformat.write(executed(Path(empty)), NOTEBOOK)
