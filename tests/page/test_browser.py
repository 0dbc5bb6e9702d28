"""The chat page at /, used through a browser."""

import json

import pytest
from conftest import KEY
from selenium.webdriver.common.keys import Keys

SUM = "What is 23 + 45?"


def background(page):
    return page.run("getComputedStyle(document.body).backgroundColor")


def test_a_chat_is_answered_with_its_timing(page, url):
    page.open(url)
    page.type(SUM, Keys.ENTER)
    page.answered(1)
    assert page.texts(".question") == [SUM]
    assert page.texts(".answer") == ["68"]
    assert page.texts(".figures dt") == ["tokens", "TTFT", "TPOT", "tokens/s"]
    assert all(float(value.split()[0]) >= 0 for value in page.texts(".figures dd"))
    assert len(page.all(".piece[title^='+']")) == len(page.all(".answer .piece")) - 1
    assert page.one("#announcer").get_attribute("textContent") == "The model answered: 68"


def test_the_gaps_are_drawn_as_long_as_they_were(page, slow_url):
    """With steps of 100 ms no gap has a shortest level. The last token only ends the answer."""
    page.open(slow_url)
    page.one("#max-tokens").send_keys("5")
    page.one("#question").send_keys("abc", Keys.ENTER)
    page.answered(1)
    assert (
        page.one(".chart").get_attribute("aria-label").startswith("Gaps between pieces: median 1")
    )
    assert len(page.all(".chart rect")) == 3
    assert page.all(".chart .gap-0, .chart .gap-1") == []


def test_models_are_listed_with_their_context(page, url):
    page.open(url)
    assert page.texts("#models label") == ["sage-tiny\n2,048 tokens"]


def test_the_history_and_the_parameters_are_sent(page, url):
    page.open(url)
    page.run("window.asked = []")
    page.browser.execute_script(
        "const real = fetch; fetch = (path, options) => {"
        " if (options.body) asked.push(JSON.parse(options.body)); return real(path, options); }"
    )
    for selector, text in (("#system", "Be kind."), ("#temperature", "0.5"), ("#max-tokens", "7")):
        page.one(selector).send_keys(text)
    for number in (1, 2):
        page.one("#question").send_keys(SUM, Keys.ENTER)
        page.answered(number)
    first, second = page.run("asked")
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("sage-tiny", 0.5, 7)
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page, url, theme):
    page.emulate(theme)
    page.open(url)
    assert page.findings() == []
    page.type(SUM, Keys.ENTER)
    page.answered(1)
    page.type("x " * 4000, Keys.ENTER)
    page.answered(2)
    assert page.all(".failure")
    assert page.findings() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_where_a_key_is_asked(page, closed_url, theme):
    page.emulate(theme)
    page.open(closed_url)
    assert page.one("#key-form").is_displayed()
    assert page.findings() == []


def test_the_theme_is_the_systems_until_one_is_chosen(page, url):
    page.open(url)
    light = background(page)
    page.emulate("dark")
    dark = background(page)
    assert light != dark
    button = page.one("#theme")
    button.send_keys(Keys.ENTER)
    assert (button.text, background(page)) == ("Theme: light", light)
    page.open(url)
    assert background(page) == light
    page.one("#theme").send_keys(Keys.ENTER)
    page.emulate("light")
    assert (page.one("#theme").text, background(page)) == ("Theme: dark", dark)


def test_the_keyboard_reaches_everything(page, url):
    """The Tab key reaches every control after the first button; each shows its focus."""
    page.open(url)
    page.run("document.getElementById('clear').focus()")
    reached = []
    for _ in range(20):
        page.type(Keys.TAB)
        reached.append(page.focused.get_attribute("id") or page.focused.get_attribute("name"))
        if page.focused.tag_name != "body":
            assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if reached[-1] == "send":
            break
    wanted = ["theme", "panel-toggle", "model", "mode", "system", "temperature"]
    assert reached == [*wanted, "max-tokens", "timing", "conversation", "question", "send"]


def test_shift_and_enter_start_a_new_line(page, url):
    page.open(url)
    page.one("#max-tokens").send_keys("4")
    page.one("#question").click()
    page.type("one", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "two")
    assert page.one("#question").get_attribute("value") == "one\ntwo"
    assert page.all(".turn") == []
    page.type(Keys.ENTER)
    page.answered(1)
    assert page.texts(".question") == ["one\ntwo"]


@pytest.mark.parametrize("how", ["escape", "button"])
def test_an_answer_is_stopped(page, slow_url, how):
    page.open(slow_url)
    page.one("#max-tokens").send_keys("2000")
    page.one("#question").send_keys("abc", Keys.ENTER)
    page.until(lambda: page.texts(".figures dt"))
    if how == "escape":
        page.type(Keys.ESCAPE)
    else:
        page.one("#stop").click()
    page.answered(1)
    assert "stopped" in page.one(".foot").text
    assert page.focused.get_attribute("id") == "question"
    page.until(lambda: json.loads(page_text(page, "load"))["server_load"] == 0)


def page_text(page, path):
    """The server's answer at a path."""
    script = "fetch(arguments[0]).then((found) => found.text()).then(arguments[1])"
    return page.browser.execute_async_script(script, path)


def test_a_model_without_a_chat_template_continues_a_text(page, slow_url):
    page.open(slow_url)
    page.until(lambda: page.one("#mode-hint").is_displayed())
    assert "no chat template" in page.one("#mode-hint").text
    assert page.one("input[value=completion]").is_selected()
    page.one("#max-tokens").send_keys("3")
    page.one("#question").send_keys("abc", Keys.ENTER)
    page.answered(1)
    assert page.texts(".figures dd")[0] == "3"
    assert "ended at the most tokens" in page.one(".foot").text


def test_an_error_is_shown_as_the_server_words_it(page, url):
    page.open(url)
    question = ("x " * 3000).strip()
    page.type(question, Keys.ENTER)
    page.answered(1)
    message, facts = page.texts(".failure p")[-2:]
    assert "maximum context length is 2048" in message
    assert "status 400" in facts
    assert "context_length_exceeded" in facts
    assert page.one("#question").get_attribute("value") == question  # to be shortened


def test_a_parameter_out_of_range_is_not_sent(page, url):
    page.open(url)
    page.one("#temperature").send_keys("-1")
    page.one("#question").send_keys(SUM, Keys.ENTER)
    assert page.all(".turn") == []
    assert page.focused.get_attribute("id") == "temperature"


def test_a_key_is_asked_for_and_stays_in_the_tab(page, closed_url):
    page.open(closed_url)
    assert page.one("#key-reason").text == "a valid API key is needed"
    page.type("wrong", Keys.ENTER)
    page.until(lambda: page.one("#key-form").is_displayed())
    page.one("#key").clear()
    page.one("#key").send_keys(KEY, Keys.ENTER)
    page.until(lambda: page.all("#models input"))
    page.until(lambda: page.focused.get_attribute("id") == "question")
    page.type(SUM, Keys.ENTER)
    page.answered(1)
    assert page.texts(".answer") == ["68"]
    assert page.run("Object.values(localStorage).concat(document.cookie)") == [""]
    page.open(closed_url)
    assert not page.one("#key-form").is_displayed()


def test_a_new_conversation_forgets_the_old(page, url):
    page.open(url)
    page.type(SUM, Keys.ENTER)
    page.answered(1)
    page.one("#clear").click()
    assert page.all(".turn") == []
    assert page.one("#welcome").is_displayed()
    assert page.focused.get_attribute("id") == "question"


def test_an_answer_is_copied(page, url):
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.open(url)
    page.type(SUM, Keys.ENTER)
    page.answered(1)
    page.one(".foot button").click()
    page.until(lambda: page.one(".foot button").text == "Copied")
    script = "navigator.clipboard.readText().then(arguments[0])"
    assert page.browser.execute_async_script(script) == "68"


def test_nothing_comes_from_elsewhere(page, url):
    page.open(url)
    page.type(SUM, Keys.ENTER)
    page.answered(1)
    named = page.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(named) >= 8
    assert [name for name in named if not name.startswith(f"{url}/")] == []


def test_what_a_model_says_is_text(page, url):
    """Markup in a question or an answer is shown as text, and not interpreted."""
    page.open(url)
    page.type("<img src=x onerror=alert(1)>", Keys.ENTER)
    page.answered(1)
    assert page.texts(".question") == ["<img src=x onerror=alert(1)>"]
    assert page.all("#turns img") == []


@pytest.mark.parametrize("width", [360, 800])
def test_nothing_is_cut_off_on_a_narrow_screen(page, url, width):
    metrics = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.open(url)
    assert not page.one("#panel").is_displayed()
    page.one("#panel-toggle").click()
    assert page.one("#panel").is_displayed()
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.findings() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_reference_of_the_api_can_be_read(page, url, theme):
    page.emulate(theme)
    page.browser.get(f"{url}/docs")
    assert "/v1/chat/completions" in page.one("main").text
    assert page.findings() == []
    assert page.console() == []
