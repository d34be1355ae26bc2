"""Test the page in a browser, if one is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.report.pages import Page, whole_page
from tests.report.test_html import hostile_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=2000",
    "--enable-logging=stderr",
    "--dump-dom",
)


@pytest.mark.slow
@pytest.mark.parametrize("make", [whole_page, hostile_page])
def test_the_script_runs_and_nothing_else_does(make: object, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    assert callable(make)
    (tmp_path / "report.html").write_text(make(), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    page = Page(done.stdout.removeprefix("<!DOCTYPE html>"))
    assert page.all("html")[0].classes == ["js"]
    heads = page.all("section", "head")
    assert heads
    for head in heads:
        shown = [found for found in page.all("article", "shown") if head in found.ancestors]
        assert [found.classes[1] for found in shown] == ["of-base", "of-extension", "of-latent"]
