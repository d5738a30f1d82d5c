"""The compare page on real recorded experiments: every number is checked against the lines of their spools."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import duckdb
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect
from scipy import stats

from tests.recorded import AGAIN, CHOICE, STOPPED, SWEEP, SWEPT, TEXT
from tests.ui.acts import THEMES
from tests.ui.recorded_studio import group, lines, open_compare, pick, recorded_studio, table, wait_drawn, whole
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def url(data: Path) -> Iterator[str]:
    yield from recorded_studio(data)


@pytest.fixture
def compare(page: Page, url: str) -> Page:
    return open_compare(page, url)


def journal(data: Path) -> list[dict[str, object]]:
    file = data / "journal.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_lane_has_a_row_newest_first(compare: Page, data: Path) -> None:
    ids = [g.get_attribute("data-experiment") for g in compare.locator("[data-experiment]").all()]
    assert [i for i in ids if i in (SWEEP, AGAIN, TEXT, CHOICE, STOPPED)] == [STOPPED, CHOICE, TEXT, AGAIN, SWEEP]
    for x in (SWEEP, CHOICE):
        lanes = lines(data, x, "submitted")[0]["spec"]["lanes"]
        expect(group(compare, x).locator("tr")).to_have_count(len(lanes) + 1)
    row = group(compare, CHOICE).locator("tr").nth(2)
    expect(row).to_contain_text(f"{100 * whole(data, CHOICE, 1, 'accuracy'):.3g}")
    expect(group(compare, STOPPED)).to_contain_text("cancelled")


def test_filters(compare: Page) -> None:
    shown = compare.locator("[data-experiment]")
    compare.get_by_label("Search the history").fill("kivi")
    expect(shown).to_have_count(1)
    expect(shown.first).to_have_attribute("data-experiment", AGAIN)
    compare.get_by_label("Search the history").fill("")
    compare.get_by_label("Filter by workload").select_option("perplexity")
    expect(shown).to_have_count(1)
    compare.get_by_label("Filter by status").select_option("cancelled")
    expect(compare.locator(".ht .ps-empty")).to_have_text("No experiment fits these filters; clear them to see all.")
    compare.get_by_label("Filter by workload").select_option("")
    expect(shown).to_have_count(1)
    expect(shown.first).to_have_attribute("data-experiment", STOPPED)


def test_tag_and_note_by_keyboard(compare: Page, data: Path) -> None:
    evil = '<img src=x onerror="window.pwned=1">${window.pwned=1}{{value}}'
    tag = group(compare, TEXT).locator("[data-act=tag]")
    tag.focus()
    compare.keyboard.press("Enter")
    compare.keyboard.type("good")
    compare.keyboard.press("Enter")
    expect(group(compare, TEXT).locator(".ht-tag")).to_have_text(re.compile("good"))
    expect(tag).to_be_focused()
    group(compare, TEXT).locator("[data-act=note]").click()
    compare.keyboard.type(evil)
    compare.keyboard.press("Control+Enter")
    expect(group(compare, TEXT).locator(".ht-note")).to_have_text(evil)
    assert compare.evaluate("window.pwned") is None
    compare.get_by_label("Filter by tag").select_option("good")
    expect(compare.locator("[data-experiment]")).to_have_count(1)
    group(compare, TEXT).get_by_role("button", name="Take the tag good off").click()
    expect(compare.locator(".ht-said")).to_contain_text("Took the tag 'good' off 1 experiment.")
    compare.get_by_role("button", name="Undo").click()
    expect(group(compare, TEXT).locator(".ht-tag")).to_have_count(1)
    assert [(e["kind"], e.get("tag") or e.get("text")) for e in journal(data) if e["experiment"] == TEXT] == [
        ("tag", "good"), ("note", evil), ("untag", "good"), ("tag", "good"),
    ]  # fmt: skip


def test_delete_undo_and_bring_back(compare: Page, data: Path) -> None:
    before = (data / "spool" / f"{STOPPED}.jsonl").read_bytes()
    for back in ("Undo", "Bring back"):
        group(compare, STOPPED).locator("[data-act=delete]").click()
        expect(group(compare, STOPPED)).to_have_count(0)
        if back == "Bring back":
            compare.get_by_label("Deleted").check()
            expect(compare.locator("[data-experiment]")).to_have_count(1)
            group(compare, STOPPED).get_by_role("button", name="Bring back").click()
            compare.get_by_label("Deleted").uncheck()
        else:
            compare.get_by_role("button", name="Undo").click()
        expect(group(compare, STOPPED)).to_have_count(1)
    assert [e["kind"] for e in journal(data) if e["experiment"] == STOPPED] == ["delete", "undelete"] * 2
    assert (data / "spool" / f"{STOPPED}.jsonl").read_bytes() == before


# -- charts ------------------------------------------------------------------------------------------------------------


def test_picks_survive_a_reload(compare: Page, url: str) -> None:
    pick(compare, CHOICE)
    chips = compare.locator(".ht-chips li")
    expect(chips.first).to_contain_text("Baseline")  # names come from the server
    count = chips.count()
    open_compare(compare, url)  # the page anew, in the same tab
    expect(chips).to_have_count(count)
    expect(chips.first).to_contain_text("Baseline")
    wait_drawn(compare, "pareto")
    compare.locator(".ht-tray").get_by_role("button", name="Clear").click()
    expect(chips).to_have_count(0)


def test_pareto_by_mouse_and_by_keyboard(compare: Page, data: Path) -> None:
    pick(compare, CHOICE)
    figure = wait_drawn(compare, "pareto")
    assert figure.locator("thead th").all_inner_texts()[1::2] == ["Scoring speed", "Accuracy", "Verdict"]
    point = figure.locator("svg text").filter(has_text="■").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box is not None
    compare.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(figure.locator("[aria-pressed=true]")).to_have_attribute("data-run", f"{CHOICE}/1")
    expect(compare.locator("#diff .rd-body")).to_have_attribute("data-shown", f"{CHOICE}/0 {CHOICE}/1")
    figure.locator(f"[data-run='{CHOICE}/0']").focus()
    compare.keyboard.press("Enter")
    expect(figure.locator("[aria-pressed=true]")).to_have_attribute("data-run", f"{CHOICE}/0")
    rows = {r[0][2:]: r for r in table(figure)}
    speed = [whole(data, CHOICE, lane, "score_tokens_per_s") for lane in (0, 1)]
    worse = speed[1] <= speed[0] and whole(data, CHOICE, 1, "accuracy") <= whole(data, CHOICE, 0, "accuracy")
    assert rows["rtn:bits=4"][-1].startswith("beaten by Baseline" if worse else "on the front")
    assert rows["Baseline"][-1] == "baseline"


def test_axes_can_be_chosen(compare: Page, data: Path) -> None:
    pick(compare, SWEEP)
    figure = wait_drawn(compare, "pareto")
    compare.locator("#axis-x input").click()
    compare.get_by_role("option", name="KV cache", exact=True).click()
    expect(figure.locator("thead")).to_contain_text("KV cache")
    shown = [float(row[1].removesuffix(" kB")) for row in table(wait_drawn(compare, "pareto"))]
    assert shown == pytest.approx([whole(data, SWEEP, lane, "kv_bytes") / 1000 for lane in range(len(SWEPT) + 1)], rel=5e-3)


def test_sweep(compare: Page, data: Path) -> None:
    pick(compare, SWEEP)
    pick(compare, CHOICE)  # other work: no point of the sweep
    figure = wait_drawn(compare, "sweeps", 2)
    rows = table(figure)
    assert [row[1] for row in rows] == [str(k) for k in SWEPT]
    assert [row[2] for row in rows] == [f"{whole(data, SWEEP, lane, 'decode_tokens_per_s'):,.0f} tokens/s" for lane in (1, 2, 3)]
    expect(compare.locator("#pareto .ps-note-warning")).to_contain_text("different workloads (multiple-choice, needle)")


def test_latencies(compare: Page, data: Path) -> None:
    pick(compare, SWEEP, 0)
    pick(compare, TEXT, 0)  # scores text
    rows = table(wait_drawn(compare, "latency"))
    stamps: dict[str, list[float]] = {}
    for e in lines(data, SWEEP, "tokens"):
        if e["lane"] == 0:
            stamps.setdefault(e["item"], []).extend(e["at"])
    waits = np.concatenate([np.diff(at) for at in stamps.values()])
    assert len(rows) == 1
    assert rows[0][1] == f"{len(waits)}"
    number, unit = rows[0][2].split()
    assert float(number) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit] == pytest.approx(np.median(waits), rel=6e-3)  # three digits


def test_diff_with_paired_tests(compare: Page, data: Path) -> None:
    pick(compare, CHOICE)
    body = compare.locator("#diff .rd-body")
    expect(body).to_have_attribute("data-shown", f"{CHOICE}/0 {CHOICE}/1")
    right = [{e["item"]: e["correct"] for e in lines(data, CHOICE, "output") if e["lane"] == lane} for lane in (0, 1)]
    only = [sum(right[s][i] and not right[1 - s][i] for i in right[0]) for s in (0, 1)]
    p = stats.binomtest(only[0], sum(only), 0.5).pvalue if sum(only) else 1.0
    row = body.locator("tr[data-name=accuracy]")
    expect(row).to_contain_text(f"only A right: {only[0]}, only B right: {only[1]} of {len(right[0])}; McNemar p = {p:.3g}"[:60])
    ratio = whole(data, CHOICE, 1, "weight_bytes") / whole(data, CHOICE, 0, "weight_bytes")
    expect(body.locator("tr[data-name=weight_bytes]")).to_contain_text(f"{ratio:.2f}×")
    expect(body.locator("tr[data-name='rtn.bits']")).to_contain_text("4")
    expect(body.get_by_text("Both ran in the same environment.")).to_be_visible()
    compare.get_by_role("button", name="Swap").click()
    expect(body).to_have_attribute("data-shown", f"{CHOICE}/1 {CHOICE}/0")
    expect(body.locator("tr[data-name=weight_bytes]")).to_contain_text(f"{1 / ratio:.2f}×")


def test_diff_over_two_experiments_says_what_it_cannot_say(compare: Page) -> None:
    pick(compare, SWEEP, 0)
    pick(compare, AGAIN, 0)
    expect(compare.locator("#diff .rd-body")).to_contain_text("The two runs were not interleaved")
    pick(compare, TEXT, 0)
    compare.get_by_label("Run B").select_option(f"{TEXT}/0")
    expect(compare.locator("#diff .rd-body")).to_contain_text("did not see the same items, so nothing is paired")


# -- files -------------------------------------------------------------------------------------------------------------


def test_export_csv_and_parquet(compare: Page, data: Path) -> None:
    pick(compare, CHOICE, 1)
    expect(compare.get_by_role("button", name="CSV")).to_be_enabled()
    wanted = sorted((e["name"], e["item"] or "", e["value"]) for e in lines(data, CHOICE, "metric") if e["lane"] == 1)
    with compare.expect_download() as found:
        compare.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(found.value.path()).read_text())))
    assert sorted((r["metric"], r["item"], float(r["value"])) for r in rows) == wanted
    with compare.expect_download() as found:
        compare.get_by_role("button", name="Parquet").click()
    read = duckdb.execute("SELECT metric, coalesce(item, ''), value FROM read_parquet(?)", [str(found.value.path())]).fetchall()
    assert sorted(read) == wanted


def test_export_a_script_of_a_lane(compare: Page) -> None:
    pick(compare, SWEEP, 1)
    with compare.expect_download() as found:
        compare.get_by_role("button", name="Python script").click()
    assert found.value.suggested_filename == f"{SWEEP}-lane-1.py"
    text = Path(found.value.path()).read_text()
    compile(text, "script", "exec")  # what it computes is tested in tests/worker/test_script_export.py
    assert f"experiment {SWEEP}, lane 1" in text


def test_run_card_goes_out_and_comes_back(compare: Page, data: Path, tmp_path: Path) -> None:
    pick(compare, CHOICE, 1)
    with compare.expect_download() as found:
        compare.get_by_role("button", name="Run card", exact=True).click()
    card = json.loads(Path(found.value.path()).read_text())
    assert card["experiment"]["id"] == CHOICE
    said, choose = compare.locator(".rf-said"), compare.locator("#run-files input[type=file]")
    before = len(list((data / "spool").glob("*.jsonl")))

    def give(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        choose.set_input_files(tmp_path / name)

    give("tampered.json", json.dumps({**card, "experiment": {**card["experiment"], "seconds": 0.001}}))
    expect(said).to_contain_text("tampered.json was changed after it was exported")
    give("newer.json", json.dumps({**card, "version": 99}))
    expect(said).to_contain_text("newer.json is a run card of version 99; this studio reads version 1")
    give("other.json", "{}")
    expect(said).to_contain_text("other.json is no run card")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(100_000_001)
    choose.set_input_files(tmp_path / "huge.json")
    expect(said).to_contain_text("huge.json has 100 MB; a run card has at most 100 MB")
    assert len(list((data / "spool").glob("*.jsonl"))) == before
    choose.set_input_files(found.value.path())
    expect(said).to_contain_text("it is in the history above")
    (new,) = {p.stem for p in (data / "spool").glob("*.jsonl")} - {SWEEP, AGAIN, TEXT, CHOICE, STOPPED}
    expect(group(compare, new)).to_contain_text("imported")
    expect(group(compare, new).locator("tr").nth(2)).to_contain_text(f"{100 * whole(data, CHOICE, 1, 'accuracy'):.3g}")
    group(compare, new).locator("[data-act=delete]").click()
    expect(group(compare, new)).to_have_count(0)


def test_sql_box(compare: Page, data: Path) -> None:
    compare.get_by_role("button", name="SQL over the history").click()
    box, answer = compare.get_by_label("SQL query"), compare.locator(".sq-answer")
    box.fill(f"SELECT name, value FROM metrics WHERE experiment = '{CHOICE}' AND lane = 1 AND name = 'accuracy' AND item IS NULL")
    box.press("Control+Enter")
    expect(answer.locator("tbody tr")).to_have_count(1)
    expect(answer.locator("tbody td")).to_have_text(f"{whole(data, CHOICE, 1, 'accuracy'):.6g}")
    for sql, sentence in (
        ("DELETE FROM runs", "only reading is allowed here: DELETE is refused; write one SELECT"),
        ("SELECT * FROM read_csv('/etc/passwd')", "files, the network, extensions and settings cannot be used in queries"),
        ("SELECT 1; SELECT 2", "one SELECT at a time"),
    ):
        box.fill(sql)
        compare.get_by_role("button", name="Run query").click()
        expect(compare.locator(".sq-said .ps-note-error")).to_contain_text(re.compile(re.escape(sentence), re.IGNORECASE))


# -- the page as a whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", THEMES)
def test_axe_is_clean(page: Page, url: str, theme: str) -> None:
    open_compare(page, url, theme)
    pick(page, SWEEP)
    wait_drawn(page, "pareto")
    wait_drawn(page, "latency")
    page.get_by_role("button", name="SQL over the history").click()
    group(page, TEXT).locator("[data-act=note]").click()
    for summary in page.locator("#pareto summary, #sweeps summary, #latency summary, #diff summary").all():
        summary.click()
    expect(page.locator("#diff .rd-body table").first).to_be_visible()
    assert violations(page) == []


def test_phone_width(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = open_compare(context.new_page(), url)
    pick(page, SWEEP)
    wait_drawn(page, "pareto")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate("""[...document.querySelectorAll('#history button, #diff button, #run-files button, #pareto button')].filter((b) => b.offsetParent)
        .map((b) => [b.textContent, b.getBoundingClientRect()]).filter(([, r]) => r.height < 24 || r.width < 24).map(([t]) => t)""")
    assert small == []
    context.close()


def test_only_this_machine_is_asked_and_nothing_is_complained_of(page: Page, url: str) -> None:
    hosts, said = set(), []
    page.on("request", lambda r: hosts.add(urlsplit(r.url).hostname))
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    open_compare(page, url)
    pick(page, SWEEP)
    wait_drawn(page, "sweeps", 2)
    assert hosts - {None} == {"127.0.0.1"}
    assert said == []


def test_an_empty_history_says_what_to_do(page: Page, another_studio: Callable[..., str]) -> None:
    open_compare(page, another_studio())
    expect(page.locator("#history .ps-empty")).to_contain_text("Put a policy into a lane in the Studio tab and press Run")
    expect(page.locator("#pareto .ps-empty")).to_contain_text("Pick at least two runs above")
    expect(page.locator("#diff .ps-empty")).to_contain_text("Pick two or more runs above")
    expect(page.get_by_role("button", name="CSV")).to_be_disabled()
