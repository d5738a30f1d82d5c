"""What holds for the whole page: accessibility, phone, dark, no request leaves the machine, login, the public endpoints."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client
from playwright.sync_api import Browser, Page, expect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.ui.acts import THEMES, add, example, run, wait_status
from tests.ui.conftest import open_studio

pytestmark = pytest.mark.browser


def violations(page: Page) -> list[tuple[str, str]]:
    """axe's findings: rule and the first element."""
    found = Axe().run(page).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found]


@pytest.mark.parametrize("theme", THEMES)
def test_axe_is_clean_with_everything_on_the_page(page: Page, studio_url: str, theme: str) -> None:
    open_studio(page, f"{studio_url}/?__theme={theme}")
    example(page, "Half the cache")
    run(page)
    wait_status(page, "finished")
    add(page, "H2O")
    expect(page.locator(".pe-problem")).to_have_count(1)
    for accordion in ("Workload options", "Measurement settings"):
        page.get_by_role("button", name=accordion).click()
    for table in page.get_by_text("Table", exact=True).all():
        table.click()
    page.wait_for_timeout(500)
    found = violations(page)
    assert found == [], found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone_width(browser: Browser, studio_url: str, theme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = open_studio(context.new_page(), f"{studio_url}/?__theme={theme}")
    example(page, "Everything at once")
    run(page)
    wait_status(page, "finished")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate("""[...document.querySelectorAll('#editor button, #race button')].filter((b) => b.offsetParent)
        .map((b) => [b.textContent, b.getBoundingClientRect()]).filter(([, r]) => r.height < 24 || r.width < 24).map(([t]) => t)""")
    assert small == []
    context.close()


def test_nothing_is_asked_of_another_machine(page: Page, studio_url: str) -> None:
    hosts = set()
    page.on("request", lambda r: hosts.add(urlsplit(r.url).hostname))
    page.on("websocket", lambda w: hosts.add(urlsplit(w.url).hostname))
    open_studio(page, studio_url)
    example(page, "Half the cache")
    run(page)
    wait_status(page, "finished")
    assert hosts - {None} == {"127.0.0.1"}


def test_no_error_in_the_console(page: Page, studio_url: str) -> None:
    said = []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    open_studio(page, studio_url)
    example(page, "Half the cache")
    run(page)
    wait_status(page, "finished")
    assert said == []


def test_the_page_needs_no_torch() -> None:
    code = "import sys, app.server; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'workers', 'diffusers'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_socket_wants_a_token_and_this_host(studio: Page, studio_url: str) -> None:
    with (
        pytest.raises((ConnectionClosed, InvalidStatus)),
        connect(f"{studio_url.replace('http', 'ws')}/live/guess", origin=studio_url) as socket,
    ):
        socket.recv(timeout=5)
    with studio.expect_websocket() as found:
        studio.reload()
    address = found.value.url
    with connect(address, origin=studio_url) as socket:
        assert "jobs" in json.loads(socket.recv(timeout=5))
    with pytest.raises((ConnectionClosed, InvalidStatus)), connect(address, origin="http://evil.example") as socket:
        socket.recv(timeout=5)
    with pytest.raises((ConnectionClosed, InvalidStatus)), connect(address) as socket:
        socket.recv(timeout=5)


def test_login_covers_the_page_and_the_token(another_studio: Callable[..., str], page: Page) -> None:
    url = another_studio("--auth")
    for path, body in (("/config", None), ("/gradio_api/component_server", b"{}"), ("/gradio_api/call/run", b"{}")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(
                urllib.request.Request(url + path, data=body, headers={"Content-Type": "application/json"}), timeout=10
            )
        assert refused.value.code == 401
    page.goto(url)
    page.get_by_label("username", exact=False).fill("ada")
    page.get_by_label("password", exact=False).fill("lovelace")
    page.get_by_role("button", name="Login").click()
    page.locator("#race [data-ready='1']").wait_for()
    example(page, "Half the cache")
    run(page)
    wait_status(page, "finished")


def test_visitors_cannot_open_files_of_the_host(another_studio: Callable[..., str], page: Page) -> None:
    url = another_studio("--remote")
    open_studio(page, url)
    model = page.locator("#model input")
    model.fill("/etc")
    model.press("Enter")
    expect(page.locator("#model-facts")).to_contain_text("Models cannot be opened by path here ('/etc')")
    run(page)
    expect(page.locator("#message")).to_contain_text("Models cannot be opened by path here ('/etc')")
    client = Client(url, verbose=False)
    with pytest.raises(Exception, match="Files of the host cannot be opened here"):
        client.predict("smollm2-135m", "prompts", ["snapkv"], {"file": "/etc/passwd"}, {}, "cpu", api_name="/run")


def test_public_endpoints(studio_url: str) -> None:
    client = Client(studio_url, verbose=False)
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/run",
        "/status",
        "/cancel",
        "/catalog",
    }
    assert {m["id"] for m in client.predict(api_name="/catalog")["methods"]} >= {"snapkv", "rtn"}
    started = client.predict(
        "smollm2-135m",
        "prompts",
        ["snapkv:keep=0.25", {"name": "w4", "steps": [{"policy": "rtn"}]}],
        {"items": 1},
        {},
        "cpu",
        api_name="/run",
    )
    for _ in range(200):
        state = client.predict(started["experiment"], api_name="/status")
        if state["status"] == "finished":
            break
    assert [lane["pipeline"] for lane in state["lanes"]] == ["baseline", "snapkv:keep=0.25", "rtn"]
    assert state["lanes"][1]["ratios"]["decode_tokens_per_s"]["value"] == pytest.approx(1.4)
    with pytest.raises(Exception, match="there is no policy 'snapvk'; did you mean 'snapkv'"):
        client.predict("smollm2-135m", "prompts", ["snapvk"], {}, {}, "cpu", api_name="/run")
    slow = client.predict("smollm2-135m", "prompts", ["snapkv"], {"items": 50}, {}, "cpu", api_name="/run")
    with pytest.raises(Exception, match="does not cancel"):
        client.predict(slow["experiment"], "guess", api_name="/cancel")
    client.predict(slow["experiment"], slow["cancel_token"], api_name="/cancel")
    for _ in range(200):
        if client.predict(slow["experiment"], api_name="/status")["status"] == "cancelled":
            break
    else:
        pytest.fail("not cancelled")
