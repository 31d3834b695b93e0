"""A real browser without a window, for the tests that open a page."""

import html
import json
import re
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
FLAGS = ["--headless", "--disable-gpu", "--no-sandbox", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
PROBE = """\
<!DOCTYPE html><html lang="en"><body style="margin:0"><pre id="found"></pre>
<iframe style="border:0" width="{width}" height="800" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
  const boxes = [...inner.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg"));
  document.getElementById("found").textContent = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth,
    wide: boxes.filter(e => e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.outerHTML.slice(0, 90)),
    drawn: [...inner.querySelectorAll("svg")].map(e => e.getBoundingClientRect().height),
    title: inner.title,
  }});
}};
</script></body></html>
"""


def find():
    """The browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def call(folder, *arguments):
    """Run the browser; its standard output, and what it has to say of the page."""
    command = [find(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(page, folder, width):
    """Open the text of a page `width` wide: sizes of page and charts, elements that are too wide, console lines."""
    frame = folder / "frame.html"
    frame.write_text(PROBE.format(width=width, page=html.escape(page, quote=True)), encoding="utf-8")
    output, console = call(folder, "--window-size=1200,900", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    result = re.search(r'<pre id="found">(.*?)</pre>', output, re.S)[1]
    return json.loads(html.unescape(result)), console


def screenshot(page, path, folder):
    """A picture of the page's file, whose width and height are returned."""
    call(folder, "--window-size=1200,2400", f"--screenshot={path}", page.as_uri())
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
