"""docs/play.html in a real browser. Run it by hand, on a machine where npm can install one:

npm install --prefix /tmp/play @wllama/wllama@3.13.0 puppeteer-core@24 @sparticuz/chromium@147
PLAY_MODULES=/tmp/play/node_modules python -m pytest -n 0 -m slow tests/test_play.py
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import HOME, TINY, copy_project, run_script

MODULES = Path(os.environ.get("PLAY_MODULES", "/tmp/play/node_modules"))

VISIT = """
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";
const args = ["--no-sandbox", "--no-zygote", "--disable-gpu"];
const browser = await puppeteer.launch({ args, executablePath: await chromium.executablePath(), headless: "shell" });
const page = await browser.newPage();
const status = (wanted) => page.waitForFunction(
  (wanted) => document.getElementById("status").textContent.match(wanted), { timeout: 60000 }, wanted);
await page.setViewport({ width: 760, height: 640 });
await page.goto(process.argv[1]);
await (await page.$("#file")).uploadFile(process.argv[2]);
await status("ready|cannot");
await page.$eval("#temperature", (slider) => { slider.value = "0"; slider.oninput(); });
await page.click("#tell");
await status("tokens");
process.stdout.write(await page.$eval("#story", (story) => story.textContent));
await browser.close();
"""


@pytest.mark.slow
def test_the_page_writes_the_same_story_as_sample_py(tmp_path):
    """The likeliest story after an opening equals that of sample.py to the letter, to the end of the text."""
    if not shutil.which("node") or not (MODULES / "@wllama").exists() or not (MODULES / "@sparticuz").exists():
        pytest.skip(f"needs node, and wllama and a browser in {MODULES}: see the top of this file")
    project = copy_project(tmp_path)
    run_script(project, "prepare.py", "--dataset=fables", "--max_documents=2000", "--tokenizer=bpe:400")
    run_script(project, "train.py", "--dataset=fables", *TINY, "--max_iters=200", "--eval_interval=200")
    run_script(project, "sample.py", "--export_gguf=tiny.gguf", "--gguf_type=f32")
    how = ("--temperature=0", "--max_new_tokens=2000", "--start=Once upon a time", "--device=cpu", "--dtype=float32")
    ours = run_script(project, "sample.py", *how).stdout
    (project / "docs").mkdir()
    shutil.copy(HOME / "docs/play.html", project / "docs")
    (project / "wllama").symlink_to(MODULES / "@wllama/wllama")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=project)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/docs/play.html?wllama=/wllama"
        visit = ["node", "--input-type=module", "-e", VISIT, "--", page, str(project / "tiny.gguf")]
        seen = subprocess.run(visit, cwd=MODULES.parent, capture_output=True, text=True, timeout=180)
        server.shutdown()
    assert seen.returncode == 0, seen.stderr
    assert re.search(r"\n\n(.*)\n\n\[\d+ tokens", ours, re.S).group(1) == seen.stdout
