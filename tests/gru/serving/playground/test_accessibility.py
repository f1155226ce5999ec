"""The playground with a keyboard, on a phone, in both color schemes, with reduced motion and right-to-left text."""

import re

import pytest
from selenium.webdriver.common.keys import Keys

from tests.gru.serving.playground.browser import Page, Reciter
from tests.gru.serving.server import wait_until


@pytest.mark.browser
def test_everything_can_be_done_with_the_keyboard(page: Page) -> None:
    page.site.serve(Reciter("one two three\nfour five six\nseven"))
    page.open()
    page.press(Keys.TAB)
    page.press("one")
    assert page["prompt"].get_property("value") == "one"
    page.press(Keys.ENTER, holding=Keys.CONTROL)
    assert page.finished() != ""
    seen: list[str] = []
    while "tint" not in seen:
        seen.append(
            page.js("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        )
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen[-1]
        page.press(Keys.TAB)
        assert len(seen) < 30, seen
    assert seen[:8] == ["prompt", "go", "more", "clear", "copy", "curl", "python", "SPAN"]
    assert {"SUMMARY", "temperature", "seed", "stop"} <= set(seen)
    page["go"].send_keys(Keys.CONTROL, Keys.ENTER)
    assert page.finished() and page["finish"].text != "stopped"
    page["temperature"].clear()
    page["temperature"].send_keys("0", Keys.ENTER)
    assert page.finished() == " two three\nfour five six\nseven"
    page["python"].send_keys(Keys.TAB)

    def place() -> int:
        index: int = page.js("[...document.querySelectorAll('#text span')].indexOf(document.activeElement)")
        return index

    assert place() == 0 and page["tip"].is_displayed()
    for keys, expected in [
        ([Keys.ARROW_RIGHT] * 2, 2),
        ([Keys.ARROW_LEFT], 1),
        ([Keys.ARROW_DOWN], page.text.index("four") + 1),
        ([Keys.ARROW_DOWN], page.text.index("seven") + 1),
        ([Keys.ARROW_UP] * 2, 1),
        ([Keys.END], len(page.text) - 1),
        ([Keys.ARROW_RIGHT], len(page.text) - 1),
        ([Keys.HOME], 0),
    ]:
        page.press(*keys)
        assert place() == expected, (keys, expected)
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(Keys.ARROW_RIGHT, Keys.TAB)
    page.press(Keys.TAB, holding=Keys.SHIFT)
    assert place() == 1


@pytest.mark.browser
@pytest.mark.parametrize("text", ["Lorem" * 60, "床前明月光，疑是地上霜。" * 20, "שלום עולם " * 20])
def test_nothing_is_wider_than_a_phone(page: Page, text: str) -> None:
    page.site.serve(Reciter(text))
    page.cdp("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.open()

    def fits() -> bool:
        return bool(page.js("document.documentElement.scrollWidth <= 360 && innerWidth === 360"))

    assert fits() and not page["temperature"].is_displayed()
    page["settings"].find_element("css selector", "summary").click()
    assert fits()
    assert page.generate(temperature=0, max_tokens=1000, prompt=text) == ""
    assert page.generate(prompt="") == text
    assert fits()
    assert page.style("direction") == ("rtl" if "ש" in text else "ltr")
    rights = page.js("[...document.querySelectorAll('#text span')].map((s) => s.getBoundingClientRect().right)")
    for place in (rights.index(max(rights)), len(rights) - 1):
        page.js("document.querySelectorAll('#text span')[arguments[0]].focus()", place)
        wait_until(page["tip"].is_displayed)
        tip = page["tip"].rect
        assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 360 and fits()


@pytest.mark.browser
def test_arrows_follow_the_direction_of_the_text(page: Page) -> None:
    page.site.serve(Reciter("שלום"))
    page.open()
    page.generate(temperature=0)
    page.driver.find_element("css selector", "#text span").click()
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert page.focused.text == "ו"


@pytest.mark.browser
def test_light_and_dark_have_contrast(page: Page) -> None:
    page.site.serve(Reciter("a明b"))
    grounds = set()
    for scheme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.open()
        page.generate(temperature=0)
        body, box = rgba(page.style("backgroundColor", "body")), rgba(page.style("backgroundColor"))
        grounds.add(body)
        for selector, ground in [
            ("body", body),
            ("#model", body),
            ("label", body),
            ("dd", body),
            ("#error", body),
            ("#go", rgba(page.style("backgroundColor", "#go"))),
            ("#copy", rgba(page.style("backgroundColor", "#copy"))),
            ("#prompt", rgba(page.style("backgroundColor", "#prompt"))),
            ("#text", box),
            ("#text span", over(rgba(page.style("backgroundColor", "#text span:nth-child(2)")), box)),
        ]:
            assert contrast(rgba(page.style("color", selector)), ground) >= 4.5, (scheme, selector)
        page.js("document.querySelector('#text span').style.setProperty('--surprise', 1)")
        strongest = over(rgba(page.style("backgroundColor", "#text span")), box)
        assert contrast(rgba(page.style("color", "#text span")), strongest) >= 4.5
        assert contrast(strongest, box) > 1.2  # the tint is visible
        assert contrast(rgba(page.style("borderTopColor", "#prompt")), box) >= 3
    assert len(grounds) == 2


@pytest.mark.browser
def test_nothing_moves_with_reduced_motion(page: Page) -> None:
    page.site.serve(Reciter("word " * 800, pause=0.02))
    for value, animation in (("no-preference", "pulse"), ("reduce", "none")):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": value}])
        page.open()
        page["go"].click()
        assert page.js("getComputedStyle(document.querySelector('#text'), '::after').animationName") == animation
        page["go"].click()
        page.finished()


Colour = tuple[float, ...]


def rgba(css: str) -> Colour:
    numbers = [float(number) for number in re.findall(r"[\d.]+", css)]
    return tuple([*numbers, 1.0][:4])


def over(top: Colour, ground: Colour) -> Colour:
    return (*(t * top[3] + g * (1 - top[3]) for t, g in zip(top[:3], ground[:3], strict=True)), 1.0)


def contrast(one: Colour, other: Colour) -> float:
    """Reference: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(colour: Colour) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
