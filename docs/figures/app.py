"""
The screenshot of `hack-pipelines app` with the small model inside the package.

    python docs/figures/app.py
    python docs/figures/app.py -o narrow.png --size 400x800 --model demo-class

It needs `pip install 'hack_pipelines[test]'` and Chromium, on the path as `chromium` or named by the variable `CHROMIUM`.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


IMAGE = Path(__file__).parents[1] / "images" / "app.png"
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main():
    parser = argparse.ArgumentParser(description="Take a screenshot of the web page.")
    parser.add_argument("-o", "--output", type=Path, default=IMAGE, help="PNG file (default: docs/images/app.png)")
    parser.add_argument("--size", default="1280x900", help="width and height of the window (default: 1280x900)")
    parser.add_argument("--model", default="demo", help="as of hack-pipelines app")
    parser.add_argument("--port", default="7870", help="a free port")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    command = [sys.executable, "-m", "hack_pipelines.cli", "app", "--model", args.model, "--port", args.port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            take(server.stdout.readline().split()[0], width, height, args.output)
        finally:
            server.terminate()
    print(args.output)


def take(url: str, width: int, height: int, output: Path):
    """A picture of the whole page, as it is when it has opened."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=SWITCHES)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(url)
        page.locator("#chart canvas, #chart svg").first.wait_for()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=output, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
