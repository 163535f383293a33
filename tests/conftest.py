"""Fixtures of the whole suite. One thread for each process: with more, this suite crawls on a busy machine."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tightfit.system.frame_stack import with_frame_stack

collect_ignore = ["scripts"]
"""Programs that tests run, not tests."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ["LC_ALL"] = "C.UTF-8"  # English; tests of Japanese choose it


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Tests that compile in their own process take as long as the command does."""
    pyfuncitem.obj = with_frame_stack(pyfuncitem.obj)


def pytest_sessionfinish() -> None:
    """End the server that tests shared, before Python complains of it."""
    if "plays" in sys.modules:
        sys.modules["plays"].end_server()


@pytest.fixture(autouse=True)
def language_of_one_test() -> Iterator[None]:
    """A command sets the language of its process, which here goes on."""
    os.environ.pop("TIGHTFIT_LANG", None)
    yield
    os.environ.pop("TIGHTFIT_LANG", None)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `tiny`: 4,000 tokens to train on, 600 to validate, 64 characters."""
    from runs import make_dataset

    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Traces are remembered for the tests of one file, and not beside the user's; one server plays for all files."""
    from plays import use_one_server

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        use_one_server(patch)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
