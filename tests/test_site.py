"""The documentation as pages: built without a warning, whole, and readable at the width of a phone."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import optimum_barber
from optimum_barber.runs.recipe.stage import STAGES

from . import browser

ROOT = Path(__file__).resolve().parents[1]
FRAME = """\
<!DOCTYPE html><html lang="en"><body style="margin:0"><pre id="sizes"></pre>
<iframe style="border:0" width="{width}" height="800" src="{page}"></iframe>
<script>
window.onload = () => {{
  const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
  const sizes = {{scroll: root.scrollWidth, client: root.clientWidth, title: inner.title}};
  document.getElementById("sizes").textContent = JSON.stringify(sizes);
}};
</script></body></html>
"""


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that writes no line for each."""

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "website/mkdocs.yml", "-d", str(directory)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return directory


def test_every_document_is_a_page(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    assert "<h1" in (site / "index.html").read_text(encoding="utf-8")


def test_every_public_name_has_its_docstring(site):
    text = (site / "python.html").read_text(encoding="utf-8")
    for name in set(optimum_barber.__all__) - {"__version__"}:
        assert re.search(rf'id="[\w.]+\.{name}"', text), name


def test_every_stage_has_its_settings_and_every_recipe_is_there(site):
    text = unescape((site / "stages.html").read_text(encoding="utf-8"))
    for name in STAGES:
        assert f'id="{name}"' in text
        for setting in STAGES[name].model_fields:
            assert f"<code>{setting}</code>" in text, f"{name}: {setting}"
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.name in text


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:)?//', page.read_text(encoding="utf-8"))
        assert not loaded, page.name


@pytest.mark.skipif(browser.find() is None, reason="needs a browser: chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_a_phone_and_a_desktop(site, tmp_path, width):
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        for page in ("index", "python", "stages", "results", "architectures-table"):
            frame = site / f"frame-{page}.html"
            frame.write_text(FRAME.format(width=width, page=f"{page}.html"), encoding="utf-8")
            address = f"http://127.0.0.1:{server.server_port}/{frame.name}"
            output, _ = browser.call(
                tmp_path, "--window-size=1400,900", "--virtual-time-budget=8000", "--dump-dom", address
            )
            sizes = json.loads(unescape(re.search(r'<pre id="sizes">(.*?)</pre>', output, re.S)[1]))
            frame.unlink()
            assert sizes["client"] == width and sizes["scroll"] <= width, (page, sizes)
            assert "optimum-barber" in sizes["title"]
        server.shutdown()
        thread.join()
