"""What stays in view, and what does not pop up, while a long text is generated."""

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.gru.serving.playground.browser import Page, Reciter
from tests.gru.serving.server import wait_until

LONG = "The moon is up, and the river is wide. " * 60


def in_view(page: Page, selector: str) -> bool:
    """Whether the element lies within the window and nothing covers its middle."""
    script = """(({ left, top, right, bottom }, element) => left >= 0 && top >= 0 && right <= innerWidth
      && bottom <= innerHeight && element.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2))
    )(document.querySelector(arguments[0]).getBoundingClientRect(), document.querySelector(arguments[0]))"""
    return bool(page.js(script, selector))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("settings", ["open", "closed"])
def test_prompt_button_and_the_texts_end_stay_in_view(page: Page, width: int, height: int, settings: str) -> None:
    page.site.serve(Reciter(LONG))
    page.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    page.open()
    page.js("document.querySelector('#settings').open = true")
    page.enter(temperature=0, max_tokens=4000, prompt="x\n" * 50, seed=1)
    page.js("document.querySelector('#settings').open = arguments[0] === 'open'", settings)
    element = page["seed"] if settings == "open" else page["prompt"]
    page.js("scrollTo(0, 10000)")
    element.send_keys(Keys.CONTROL, Keys.ENTER)
    assert page.finished() == LONG[100:]
    for selector in ("#prompt", "#go", "#finish", "#text", "#text span:last-child"):
        assert in_view(page, selector), selector
    page["text"].find_element("css selector", "span").send_keys(Keys.HOME)
    assert in_view(page, "#text span") and in_view(page, "#go")


@pytest.mark.browser
def test_the_box_follows_the_text_unless_it_was_scrolled_back(page: Page) -> None:
    page.site.serve(Reciter(LONG, pause=0.001))
    page.open()
    page.enter(temperature=0, max_tokens=4000)
    page["go"].click()
    wait_until(lambda: page.js("document.querySelector('#text').scrollTop > 100"))
    page.js("document.querySelector('#text').scrollTop = 0")
    page.finished()
    assert page.js("document.querySelector('#text').scrollTop") == 0


@pytest.mark.browser
def test_nothing_pops_up_under_a_resting_pointer(page: Page) -> None:
    page.site.serve(Reciter(LONG, pause=0.001))
    page.open()
    page.generate(temperature=0, max_tokens=4000)
    page.driver.execute_script("""addEventListener("pointermove", ({ clientX, clientY }) => {
      window.place = { clientX, clientY, bubbles: true };
    });""")
    page.hover(page.driver.find_element("css selector", "#text span:last-child"))
    wait_until(page["tip"].is_displayed)
    page.press(Keys.ENTER, holding=Keys.CONTROL)
    assert page.finished() == LONG
    page.driver.execute_script("""
      const token = document.elementFromPoint(place.clientX, place.clientY);
      // Browsers send these when something else has come under the pointer, at the next frame or much later.
      for (const kind of ["pointerover", "pointermove"]) token.dispatchEvent(new PointerEvent(kind, place));
      window.isToken = token.parentElement === text;""")
    assert page.js("isToken") and not page["tip"].is_displayed()
    ActionChains(page.driver, duration=0).move_by_offset(3, 0).perform()
    wait_until(page["tip"].is_displayed)
    page.js("document.querySelector('#text').scrollTop = 0")
    wait_until(lambda: not page["tip"].is_displayed())  # its token is out of sight
    assert page.js("document.querySelectorAll('[title]').length") == 0  # the browser's own tips


@pytest.mark.browser
def test_what_a_setting_means_is_told_when_it_has_the_focus(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    page.cdp("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    page.open()
    page["settings"].find_element("css selector", "summary").click()
    for name in ("top_k", "tint"):
        page.js("document.querySelector(arguments[0]).focus()", f"#{name}, [name={name}]")
        assert page["help"].text == page[name].get_attribute("aria-description") != ""
        assert in_view(page, "#help") and in_view(page, f"#{name}, [name={name}]")
