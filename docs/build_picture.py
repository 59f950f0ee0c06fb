"""Take the picture of a merge's page that docs/report.md shows: needs Chromium and the extra `test`.

python docs/build_picture.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
FILE = HERE / "pictures" / "page.png"
MODELS = HERE.parent / "examples" / "models"
RECIPE = """merge_method: monosoup
base_model: {models}/base
models:
  - model: {models}/finetuned
dtype: bfloat16
"""


def main() -> None:
    """Merge the small pair of examples/models and photograph its page."""
    browser_path = shutil.which("chromium")
    if browser_path is None:
        sys.exit("needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        recipe, out = Path(folder) / "recipe.yml", Path(folder) / "merged"
        recipe.write_text(RECIPE.format(models=MODELS), "utf-8")
        command = Path(sys.executable).with_name("mergekit-monosoup")
        subprocess.run([command, "merge", recipe, out, "--quiet"], check=True)
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1690})
        page.goto((out / "monosoup_report.html").as_uri())
        FILE.parent.mkdir(exist_ok=True)
        page.screenshot(path=FILE)
        browser.close()
    # A third of the size, and no difference to be seen.
    Image.open(FILE).convert("RGB").quantize(128).save(FILE, optimize=True)
    print(f"Wrote {FILE}")


if __name__ == "__main__":
    main()
