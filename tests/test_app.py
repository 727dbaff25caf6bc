"""The web page: what it measures, and in Chromium what a visitor sees."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from PIL import Image

from hack_pipelines import HackVARPipeline, __version__
from hack_pipelines.app.side_by_side import MAX_PROMPT_CHARACTERS, SideBySide, method_names
from hack_pipelines.cli import main
from hack_pipelines.cli.demo import DEMO_CLASSES, DEMO_PROMPTS
from hack_pipelines.methods import METHODS

from .components import seeds, tiny_pipeline, tiny_text_pipeline
from .test_documentation import ROOT


SPACE = ROOT / "examples" / "space"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE_SECONDS = 180


def open_demo(name: str) -> HackVARPipeline:
    pipe = HackVARPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def text_pipe():
    return open_demo("demo")


@pytest.fixture(scope="module")
def class_pipe():
    return open_demo("demo-class")


def assert_drawn(drawing, output):
    assert np.array_equal(drawing.image, output.images[0])
    assert drawing.report == output.cache_report
    assert drawing.seconds > 0


# What is measured


def test_both_pictures_are_those_of_the_pipeline(text_pipe):
    compared = SideBySide(text_pipe).compare(" a red heart ", 3, 0.1, "snapkv", "int8")
    assert compared.name == "a red heart" and compared.seed == 3
    assert_drawn(compared.full, text_pipe("a red heart", generator=seeds(3)))
    options = {"kv_budget": 0.1, "method": "snapkv", "kv_dtype": "int8"}
    assert_drawn(compared.compressed, text_pipe("a red heart", generator=seeds(3), **options))
    assert compared.allowed_tokens == 15 and compared.total_tokens == 155


def test_class_by_id_or_name(class_pipe):
    drawer = SideBySide(class_pipe)
    compared = drawer.compare(11)
    assert compared.name == "cat face" == drawer.compare("cat face").name
    assert_drawn(compared.compressed, class_pipe(11, generator=seeds(0), kv_budget=0.3))
    assert drawer.classes[11] == ("cat face (11)", 11) and len(drawer.classes) == 70


def test_examples_are_those_of_the_demo(text_pipe, class_pipe):
    drawer = SideBySide(text_pipe)
    assert drawer.examples == DEMO_PROMPTS and drawer.classes is None
    assert [class_pipe.config["id2label"][str(entry)] for entry in SideBySide(class_pipe).examples] == DEMO_CLASSES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_what_is_stored_stays_below_the_line_of_the_budget(method, kv_dtype):
    report = SideBySide(tiny_pipeline()).compare(1, 0, 0.9, method, kv_dtype)
    held = report.compressed.report
    assert 0 < max(held.bytes_by_step) == held.bytes_allocated_peak <= report.allowed_bytes
    # The line is no looser than what ids, scores and factors of the tokens that are held need.
    assert report.allowed_bytes * held.peak_tokens <= report.allowed_tokens * (held.bytes_logical_peak * 1.2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "The prompt is empty: say what to draw."),
        (" \n", "The prompt is empty: say what to draw."),
        (
            "a" * (MAX_PROMPT_CHARACTERS + 1),
            "The prompt has 2001 characters, but the page takes at most 2000: shorten it.",
        ),
    ],
)
def test_prompts_that_are_refused(text_pipe, entry, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SideBySide(text_pipe).compare(entry)


def test_budget_that_is_refused_before_anything_is_drawn(text_pipe, monkeypatch):
    monkeypatch.setattr(text_pipe, "draw_scales", None)
    with pytest.raises(ValueError, match="needs at least 5: set `kv_budget` to 5"):
        SideBySide(text_pipe).compare("a cat", kv_budget=0.02)


def test_model_without_text_encoder_is_refused():
    with pytest.raises(ValueError, match="no text encoder"):
        SideBySide(tiny_text_pipeline(with_text_encoder=False)).compare("a red apple")


# What is shown of it


@pytest.fixture(scope="module")
def page_module():
    pytest.importorskip("gradio", reason="the page is made with the extra `app`")
    from hack_pipelines.app import page

    return page


def test_facts_are_those_of_the_report(page_module, text_pipe):
    compared = SideBySide(text_pipe).compare("a red heart", kv_budget=0.1)
    rows = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page_module.facts(compared.compressed, 155))
    assert rows[:4] == [
        ("Stored at most", "362.8 KiB (371,520 bytes)"),
        ("Less than the original", "10.25 times"),
        ("Less than lossless", "6.02 times"),
        ("Tokens a head at most", "15.0 of 155"),
    ]
    assert rows[4] == ("Time", f"{compared.compressed.seconds:.2f} s")


def test_chart_has_the_bytes_after_every_scale(page_module, text_pipe):
    compared = SideBySide(text_pipe).compare("a red heart", kv_budget=0.1)
    assert page_module.chart_unit(compared) == "KiB"
    lines = {name: rows["size"].tolist() for name, rows in page_module.chart_data(compared).groupby("cache")}
    assert lines["full cache"] == [24, 120, 336, 720, 1320, 2184]
    assert lines["with the budget"][:2] == [24, 120] and max(lines["with the budget"]) == 362.8125
    assert lines["budget"] == [compared.allowed_bytes / 1024] * 6


@pytest.mark.parametrize(
    ("count", "text"), [(1, "0.0 KiB"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.5 GiB")]
)
def test_bytes_are_readable(page_module, count, text):
    assert page_module.readable(count) == text


def test_markup_in_a_prompt_is_shown_as_text(page_module, text_pipe):
    shown = page_module.results(SideBySide(text_pipe).compare("<img src=//a.b>"))[0]
    assert shown == "&lt;img src=//a.b&gt;, seed 0: full cache and hack++, kv_budget=0.3"


def test_every_method_is_described(page_module):
    assert method_names()[0] == "hack++" and sorted(method_names()) == sorted(METHODS)
    assert all(page_module.method_summary(name).endswith(".") for name in METHODS)


# The command and the Space


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert main(["app", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_missing_gradio_is_answered_with_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hack_pipelines.app.page", raising=False)
    assert refused(capsys) == "hack-pipelines: error: The web page needs gradio: pip install 'hack_pipelines[app]'\n"


def test_port_that_is_taken_is_refused_before_the_model_is_loaded(capsys, page_module):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refused(capsys, "--model", "nowhere", "--port", port)
    assert message == (
        f"hack-pipelines: error: The page cannot listen at 127.0.0.1:{port}: Address already in use. Give another `--host` "
        "or `--port`.\n"
    )
    assert "cannot listen at 203.0.113.1:" in refused(capsys, "--model", "nowhere", "--host", "203.0.113.1")


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1"])
def test_ports_that_are_none(capsys, port):
    with pytest.raises(SystemExit):
        main(["app", f"--port={port}"])
    assert f"must be a whole number from 1 to 65535 but is '{port}'" in capsys.readouterr().err


def test_device_map_and_device_are_refused_together(capsys, page_module):
    assert "leave out `--device cpu`" in refused(capsys, "--device-map", "balanced", "--device", "cpu")


def test_card_of_the_space():
    card = RepoCard.load(SPACE / "README.md").data.to_dict()
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colours
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={card['sdk_version']}" in pins
    assert card["python_version"] == re.search(r"python_requires = >=([\d.]+)", (ROOT / "setup.cfg").read_text())[1]


def test_space_installs_the_wheel_of_this_version():
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    (requirement,) = [Requirement(line) for line in lines if not line.startswith("#")]
    assert requirement.name == "hack_pipelines" and requirement.extras == {"app"}
    assert requirement.url.endswith(f"/hack_pipelines-{__version__}-py3-none-any.whl")


# In a browser


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path, and none named by the variable CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven with the extra `test`")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def servers(browser, page_module, tmp_path_factory):
    """The Space as the Hub starts it, and the command with the other model, side by side since both take a while."""
    scratch = tmp_path_factory.mktemp("servers")
    ports = {"space": free_port(), "command": free_port()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")} | {
        "GRADIO_TEMP_DIR": str(scratch),
        "HF_HUB_OFFLINE": "1",
        # As in this process, since sums in another order may draw another token.
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["-m", "hack_pipelines.cli", "app", "--model", "demo-class", "--port", str(ports["command"])]
    logs = {name: open(scratch / f"{name}.log", "w+") for name in ports}
    started = {
        "space": subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=SPACE,
            env=environment | {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(ports["space"])},
            stdout=logs["space"],
            stderr=logs["space"],
        ),
        "command": subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=logs["command"], stderr=logs["command"]
        ),
    }
    try:
        for name, process in started.items():
            wait_for(process, ports[name], scratch / f"{name}.log")
        yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        assert {name: "Traceback" in (scratch / f"{name}.log").read_text() for name in logs} == dict.fromkeys(
            logs, False
        )
    finally:
        for name, process in started.items():
            process.terminate()
            process.wait(PATIENCE_SECONDS)
            logs[name].close()


def wait_for(process, port, log):
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the page was not served: {log.read_text()}")


@pytest.fixture
def visit(browser, servers):
    """Opens a server's page; nothing on it may ask another server, fail or complain."""
    opened = []

    def open_page(name: str, **options):
        page = browser.new_page(**options)
        opened.append(SimpleNamespace(page=page, address=servers[name], requests=[], complaints=[]))
        seen = opened[-1]
        page.set_default_timeout(PATIENCE_SECONDS * 1000)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("response", lambda answer: answer.ok or seen.complaints.append(f"{answer.status} {answer.url}"))
        page.on("console", lambda line: line.type == "error" and seen.complaints.append(line.text))
        page.goto(seen.address)
        page.locator("#chart canvas, #chart svg").first.wait_for()
        return page

    yield open_page
    for seen in opened:
        assert len(seen.requests) > 10
        assert [url for url in seen.requests if not url.startswith((seen.address + "/", "data:", "blob:"))] == []
        assert seen.complaints == []
        seen.page.close()


def choose(page, **values):
    """Set what a visitor may set, by its place on the page."""
    for name, value in values.items():
        if name == "prompt":
            page.locator("#entry textarea").fill(value)
        elif name == "int8":
            page.locator("#int8 input").check()
        elif name in ("method", "entry"):
            page.locator(f"#{name} input").click()
            page.get_by_role("option", name=value, exact=True).click()
        else:
            page.locator(f"#{name} input[type=number]").fill(value)
            page.locator(f"#{name} input[type=number]").press("Tab")


def wait_for_caption(page, text):
    page.locator("#caption").get_by_text(text, exact=True).wait_for()
    page.wait_for_function("() => [...document.images].every(image => image.complete)")


def shown(page, name):
    """A picture's pixels and its facts, as the page shows them."""
    file = page.request.get(page.locator(f"#{name} img").get_attribute("src"))
    lines = page.locator(f"#{name}-facts").inner_text().split("\n")
    return np.asarray(Image.open(io.BytesIO(file.body()))), dict(zip(lines[::2], lines[1::2]))


def assert_shown(page, name, output):
    pixels, facts = shown(page, name)
    report = output.cache_report
    assert np.array_equal(pixels, output.images[0])
    assert f"({report.bytes_allocated_peak:,} bytes)" in facts["Stored at most"]
    assert facts["Less than the original"] == f"{report.bytes_full / report.bytes_allocated_peak:.2f} times"
    assert facts["Tokens a head at most"] == f"{report.peak_tokens:.1f} of 155"
    assert re.fullmatch(r"\d+\.\d\d s", facts["Time"])


def test_visitor_of_the_space_draws_a_prompt(visit, text_pipe):
    page = visit("space")
    wait_for_caption(page, "a red apple, seed 0: full cache and hack++, kv_budget=0.3")
    assert_shown(page, "compressed", text_pipe("a red apple", generator=seeds(0), kv_budget=0.3))
    choose(page, prompt="a red heart", budget="0.15", method="scale_window", seed="7")
    page.locator("#method").get_by_text("Keep the first two scales").wait_for()
    page.get_by_role("button", name="Draw both").click()
    wait_for_caption(page, "a red heart, seed 7: full cache and scale_window, kv_budget=0.15")
    assert_shown(page, "full", text_pipe("a red heart", generator=seeds(7)))
    options = {"kv_budget": 0.15, "method": "scale_window"}
    assert_shown(page, "compressed", text_pipe("a red heart", generator=seeds(7), **options))


def test_slider_moves_the_budget(visit, text_pipe):
    page = visit("space")
    page.locator("#budget input[type=range]").press("ArrowRight")
    choose(page, int8=True)
    page.locator("#entry textarea").press("Enter")
    wait_for_caption(page, "a red apple, seed 0: full cache and hack++, kv_budget=0.31, int8")
    options = {"kv_budget": 0.31, "kv_dtype": "int8"}
    assert_shown(page, "compressed", text_pipe("a red apple", generator=seeds(0), **options))


def test_example_is_drawn_when_it_is_chosen(visit, text_pipe):
    page = visit("space")
    page.get_by_role("button", name="a smiling cat").click()
    wait_for_caption(page, "a smiling cat, seed 0: full cache and hack++, kv_budget=0.3")
    assert page.locator("#entry textarea").input_value() == "a smiling cat"
    assert_shown(page, "full", text_pipe("a smiling cat", generator=seeds(0)))


def test_what_is_refused_is_said_and_the_page_goes_on(visit):
    page = visit("space")
    notice = page.locator("#notice")
    assert not notice.is_visible()
    for values, message in (
        ({"budget": "0.02"}, "`kv_budget=0.02` leaves 3 tokens a head, but method 'hack++' needs at least 5: set"),
        ({"prompt": " "}, "The prompt is empty: say what to draw."),
        ({"prompt": "a tree", "seed": ""}, "The seed is missing."),
    ):
        choose(page, **values)
        page.get_by_role("button", name="Draw both").click()
        notice.get_by_text(message).wait_for()
        assert page.locator("#caption").inner_text().startswith("a red apple, seed 0")
    choose(page, budget="0.2", seed="1")
    page.get_by_role("button", name="Draw both").click()
    wait_for_caption(page, "a tree, seed 1: full cache and hack++, kv_budget=0.2")
    assert not notice.is_visible()


def test_visitor_of_the_command_draws_a_class_on_a_phone(visit, class_pipe):
    page = visit("command", viewport={"width": 400, "height": 800})
    wait_for_caption(page, "face smiling, seed 0: full cache and hack++, kv_budget=0.3")
    choose(page, entry="animal bird (1)", seed="2")
    page.get_by_role("button", name="Draw both").click()
    wait_for_caption(page, "animal bird, seed 2: full cache and hack++, kv_budget=0.3")
    assert_shown(page, "full", class_pipe(1, generator=seeds(2)))
    assert_shown(page, "compressed", class_pipe(1, generator=seeds(2), kv_budget=0.3))
    # Nothing has to be scrolled sideways.
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
