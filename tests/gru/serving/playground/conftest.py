"""A browser, and the playground of a fresh server in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from gru.config import ServeConfig
from gru.serving.auth import digest
from tests.gru.serving.playground.browser import Page, Site


@pytest.fixture(scope="session")
def driver() -> Iterator[webdriver.Chrome]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.fail("these tests need a browser: install the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Containers have no user namespaces for the browser's sandbox, and a small /dev/shm.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def api_key() -> str:
    """The API key that the server requires; none if empty."""
    return ""


@pytest.fixture
def site(api_key: str, tmp_path: Path) -> Iterator[Site]:
    if api_key:
        (tmp_path / "keys").write_text(f"ann {digest(api_key)}")
    site = Site(ServeConfig(max_tokens=4096, keys=str(tmp_path / "keys") if api_key else None))
    yield site
    site.stop()


@pytest.fixture
def page(driver: webdriver.Chrome, site: Site) -> Iterator[Page]:
    page = Page(driver, site)
    yield page
    page.cdp("Emulation.clearDeviceMetricsOverride")
    page.cdp("Emulation.setEmulatedMedia", features=[])
    assert page.complaints() == []
