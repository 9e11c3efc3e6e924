"""Test environment: eight simulated CPU devices, exact fp32 matmuls, shape annotations that are checked.

The environment variables are set before anything imports jax or torch, and child processes inherit them.
XLA's compiled programs are kept in a folder outside the repository, so that workers, child processes and
later runs share them.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny
from jaxtyping import install_import_hook

DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= tiny.devices(DEVICES)
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"pvm_jax_tests_{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # torch; the models are too small for more threads to help

# Traced programs are millions of small objects that live on, and Python would look through them again and again.
gc.set_threshold(200_000, 50, 50)

install_import_hook("pvm_jax", "beartype.beartype")

# Files that take longest; of the others each takes less than a minute.
LONG = ("grpo", "train", "evals", "generate", "multihost", "lora", "plan_grpo", "digits", "plan", "convert")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker is left with one when the other is done (`--dist loadfile`)."""
    rank = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    import jax

    assert jax.device_count() == DEVICES, (
        f"expected {DEVICES} simulated CPU devices, got {jax.device_count()}: jax was initialized before "
        "tests/conftest.py could set XLA_FLAGS"
    )


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory, worker_id) -> Path:
    """One folder for the whole run, also under pytest-xdist, where each worker has its own base folder."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def checkpoints(shared_dir) -> "tiny.Checkpoints":
    """`checkpoints(tied=, dtype=, pvm_layers=, memory_mask=, shard_bytes=) -> Path`: each written once."""
    return tiny.Checkpoints(shared_dir / "checkpoints")


@pytest.fixture(scope="session")
def processor_dir(checkpoints) -> Path:
    """config.json, tokenizer, chat template and preprocessor files, without weights."""
    return checkpoints.processor_files()


@pytest.fixture(scope="session")
def stock_checkpoint(checkpoints) -> Path:
    """A tiny Qwen3-VL as transformers writes it: tied head, fp32, no PVM."""
    return checkpoints()


@pytest.fixture(scope="session")
def pvm_checkpoint(checkpoints) -> Path:
    """The same with open PVM blocks, under the public release's names; memory mask "causal"."""
    return checkpoints(pvm_layers=tiny.PVM_LAYERS, memory_mask="causal")


@pytest.fixture(scope="session")
def small_checkpoint(checkpoints) -> Path:
    """`tiny.small_config` with random weights, PVM open."""
    return checkpoints.small()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that keeps its console: `browser.get_log("browser")`."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium; pip install -e '.[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync --disable-quic "
        f"--force-device-scale-factor=1 --user-data-dir={profile}"
    ).split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()
