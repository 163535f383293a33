"""The largest sample of a dataset of Hugging Face's `datasets`, which this stand-in takes after."""

from typing import Any

import pyarrow as pa
import pytest

from tightfit.vgpu.arrow_samples import arrow_sizes
from tightfit.vgpu.longest_batch import longest


class Dataset:
    """Rows of an Arrow table, which are loaded one by one unless the format is "arrow"."""

    def __init__(self, table: pa.Table, kind: str | None = None) -> None:
        self._table = table
        self.format = {"type": kind, "columns": table.column_names}
        self.loaded = 0

    def with_format(self, kind: str, columns: list[str]) -> "Dataset":
        return Dataset(self._table.select(columns), kind)

    def __getitem__(self, place: Any) -> Any:
        if self.format["type"] == "arrow":
            return self._table.take(place)
        self.loaded += 1
        return self._table.slice(place, 1).to_pylist()[0]


Dataset.__module__, Dataset.__qualname__ = "datasets.arrow_dataset", "Dataset"

BATCHES = [[2 * number, 2 * number + 1] for number in range(500)]


def rows(**columns: list[object]) -> pa.Table:
    ids = [[0] * (30 if number == 777 else 10) for number in range(1000)]
    return pa.table({"input_ids": ids} | columns)


@pytest.mark.parametrize(
    "table",
    [
        rows(),
        rows(label=[1] * 1000),
        rows(label=[None, [1, 2]] * 500),
        rows(text=["three"] * 1000),
    ],
)
def test_the_batch_with_the_largest_is_found_without_loading_any(table: pa.Table) -> None:
    dataset = Dataset(table)
    assert longest(dataset, BATCHES) == (388, 500)
    assert dataset.loaded == 0


def test_columns_hold_what_samples_would() -> None:
    """Numbers count as one, and texts and lists as long as they are, as in samples that are loaded."""
    dataset = Dataset(rows(label=[1] * 1000, text=["three"] * 1000))
    sizes = arrow_sizes(dataset)
    assert sizes is not None
    assert sizes([0, 777, 3]) == [16, 36, 16]


@pytest.mark.parametrize("dataset", [Dataset(rows(), "custom"), Dataset(rows(nested=[[[1], [2]]] * 1000))])
def test_samples_that_columns_do_not_show_are_loaded(dataset: Dataset) -> None:
    assert longest(dataset, BATCHES) == (388, 500)
    assert dataset.loaded == 1000
