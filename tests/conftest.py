"""Real data lives outside the repository; tests that want it skip where there is none."""

import os
import shutil
import signal
from pathlib import Path

# Tests run side by side, each with one core: more threads would wait for each other. Set before
# PyTorch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


def pytest_configure(config):
    config.option.loadscopereorder = False  # side by side: in the order that follows
    config.addinivalue_line("markers", "device: what a GPU has to show; without one, on the CPU")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of a file share a process. Notebooks come first: they take longest."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture
def device():
    """The device that a run would take."""
    from nanorlhf.support.config import find_device

    return find_device("auto")


@pytest.fixture(scope="session")
def real_data():
    folder = os.environ.get("NANORLHF_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("NANORLHF_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2_cache(real_data, tmp_path_factory):
    """A copy: tiktoken deletes what fails its check, and then goes to the network."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for file in (real_data / "tokenizer" / "tiktoken_cache").iterdir():
        shutil.copyfile(file, cache / file.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield cache


@pytest.fixture(scope="module")
def window():
    """A browser's window; closed when the tests of a file are done."""
    from pages import start_browser

    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def phone_window():
    from pages import start_browser

    driver = start_browser(width=360, height=640, pixelRatio=2, touch=True)
    yield driver
    driver.quit()


@pytest.fixture
def foreground():
    """Programs that are started in the background ignore Ctrl-C, and so does what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
