"""Screenshots of a report for the README: `python -m tests.browser.screenshots PAGE FOLDER`.

Writes the head of the page at 1400 and 390 pixels, light and dark, and each section at 1400.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

VIEWS = {"light-1400": (1400, "light"), "dark-1400": (1400, "dark"), "light-390": (390, "light")}


def take(page_path: Path, folder: Path) -> list[Path]:
    """Take all of them; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, (width, scheme) in VIEWS.items():
            context = browser.new_context(
                viewport={"width": width, "height": 1300 if width > 500 else 844},
                color_scheme=scheme,  # type: ignore[arg-type]
                device_scale_factor=1.5,
            )
            context.set_default_timeout(120_000)
            page = context.new_page()
            page.goto(page_path.resolve().as_uri())
            page.screenshot(path=folder / f"report-{name}.png")
            taken.append(folder / f"report-{name}.png")
            if name == "light-1400":
                for section in page.locator("main section[id]").all():
                    path = folder / f"report-{section.get_attribute('id')}.png"
                    section.screenshot(path=path)
                    taken.append(path)
            context.close()
        browser.close()
    return taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    take(options.page, options.folder)
