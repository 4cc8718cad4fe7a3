"""Run what `tools/export.py --format web` has written in headless Chromium, and compare it with predict.py.

    python scripts/check_web.py DIR IMAGE_OR_FOLDER [--screenshot PNG]

The page must find the same as predict.py: boxes with an IoU above 0.98 and scores within 0.02, the same best
class, 99.5 % of the pixels in the same segments. Messages of errors in its console, and requests to other
servers, are errors, too. The exit code is 1 if anything differs.

Needs `pip install playwright onnxruntime` and Chromium (its path in the variable CHROMIUM, else
/usr/bin/chromium); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any, Iterator

import numpy as np
from PIL import Image

from emo2_mm.export import predict
from emo2_mm.export.compare import match_boxes

CHROMIUM = os.environ.get('CHROMIUM', '/usr/bin/chromium')
ANSWERED = "window.lastResult || !document.getElementById('error').hidden"
DESKTOP = dict(viewport=dict(width=1280, height=800))
PHONE = dict(viewport=dict(width=390, height=844), is_mobile=True, has_touch=True, device_scale_factor=2)
# Of the screenshot: the first two show the first bundle, the third the second.
SCREENS: list[dict[str, Any]] = [
    dict(**DESKTOP, color_scheme='light'),
    dict(**PHONE, color_scheme='dark'),
    dict(**PHONE, color_scheme='light'),
]
PATIENCE = 1200  # times 50 ms


class Handler(SimpleHTTPRequestHandler):
    """Serve files without a word; ``isolated`` allows the page to use threads."""

    def __init__(self, *args: Any, isolated: bool = False, **settings: Any) -> None:
        self.isolated = isolated
        super().__init__(*args, **settings)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header('Cross-Origin-Opener-Policy', 'same-origin')
            self.send_header('Cross-Origin-Embedder-Policy', 'require-corp')
        super().end_headers()


@contextmanager
def serve(folder: Path, isolated: bool = False) -> Iterator[str]:
    """Serve a folder on a free port of this machine; its address."""
    handler = partial(Handler, directory=str(folder), isolated=isolated)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_address[1]}/'
        finally:
            server.shutdown()


class Browser:
    """The page of a bundle in headless Chromium.

    Attributes:
        page: Playwright's page.
        errors: What has gone wrong: messages of errors, and requests that failed or left the server.
    """

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.errors = page, []
        page.on('console', lambda m: self.errors.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda error: self.errors.append(str(error)))
        page.on('requestfailed', lambda r: self.errors.append(f'{r.url}: {r.failure}'))
        page.on('request', lambda r: self._check_address(r.url, address))
        page.goto(address)
        self.wait()  # until the example is shown

    def _check_address(self, url: str, address: str) -> None:
        if not url.startswith((address, 'blob:', 'data:')):
            self.errors.append(f'the page asks another server: {url}')

    def wait_for(self, condition: str) -> None:
        """Wait for a condition in JavaScript. (Playwright's own function needs a page that allows eval.)"""
        for _ in range(PATIENCE):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise TimeoutError(f'never true: {condition}')

    def wait(self) -> dict[str, Any]:
        """What the page finds, as soon as it has."""
        self.wait_for(ANSWERED)
        if self.page.is_visible('#error'):
            raise RuntimeError(self.page.inner_text('#error'))
        return self.page.evaluate('window.lastResult')

    def ask(self, image: Path) -> dict[str, Any]:
        """Choose a picture; what the page finds in it."""
        self.page.evaluate('window.lastResult = null')
        self.page.set_input_files('#file', image)
        return self.wait()


@contextmanager
def launch() -> Iterator[Any]:
    """Headless Chromium with a camera that shows a test pattern."""
    from playwright.sync_api import sync_playwright

    arguments = ['--no-sandbox', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def open_bundle(chromium: Any, folder: Path, isolated: bool = False, **settings: Any) -> Iterator[Browser]:
    """Open the page of a bundle. ``settings`` are those of Playwright's contexts: viewport, color_scheme."""
    with serve(folder, isolated) as address:
        context = chromium.new_context(**settings)
        try:
            yield Browser(context.new_page(), address)
        finally:
            context.close()


def boxes_of(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    items = found['objects']
    dets = np.array([[*item['box'], item['score']] for item in items], np.float32).reshape(-1, 5)
    return dets, np.array([item['label'] for item in items], int)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """In what the page and predict.py differ; nothing if they agree."""
    if [found[key] for key in ('width', 'height')] != [expected[key] for key in ('width', 'height')]:
        return f'a picture of {found["width"]} x {found["height"]}'
    if 'classes' in expected:
        best = [each['classes'][0] for each in (found, expected)]
        same = best[0]['label'] == best[1]['label'] and abs(best[0]['score'] - best[1]['score']) < 0.02
        return '' if same else f'{best[0]} instead of {best[1]}'
    if 'segments' in expected:
        shares = [{item['label']: item['share'] for item in each['segments']} for each in (found, expected)]
        labels = {*shares[0], *shares[1]}
        moved = sum(abs(shares[0].get(i, 0) - shares[1].get(i, 0)) for i in labels) / 2
        return '' if moved < 0.005 else f'{moved:.1%} of the pixels in other segments'
    ours, theirs = boxes_of(found), boxes_of(expected)
    matched = len(match_boxes(ours, theirs, iou=0.98, score=0.02)[0])
    if not matched == len(ours[0]) == len(theirs[0]):
        return f'{matched} common boxes, of {len(ours[0])} and {len(theirs[0])} of predict.py'
    for mine, other in zip(found['objects'], expected['objects']):
        if 'mask' in other:
            masks = [predict.decode_mask(item['mask']) for item in (mine, other)]
            if (masks[0] & masks[1]).sum() < 0.98 * (masks[0] | masks[1]).sum():
                return f'another mask of {other["class"]}'
    return ''


def compare(browser: Browser, model: predict.Model, images: list[Path]) -> list[str]:
    """What differs from predict.py, or has gone wrong."""
    found = []
    for image in images:
        result = browser.ask(image)
        problem = difference(result, model(image))
        print(f'{image.name}: {predict.describe(result)}; {problem or "as predict.py"}', flush=True)
        found += [f'{image.name}: {problem}'] * bool(problem)
    return found + browser.errors


def shoot(browser: Browser, image: Path, settings: dict[str, Any]) -> Image.Image:
    """What the page looks like with a picture, in CSS pixels."""
    browser.ask(image)
    found = Image.open(BytesIO(browser.page.screenshot()))
    size = settings['viewport']['width'], settings['viewport']['height']
    return found.convert('RGB').resize(size, Image.Resampling.LANCZOS)


def side_by_side(pictures: list[Image.Image], gap: int = 20) -> Image.Image:
    """Pictures in a row, on a transparent ground."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    joined = Image.new('RGBA', (width, max(picture.height for picture in pictures)))
    x = 0
    for picture in pictures:
        joined.paste(picture, (x, 0))
        x += picture.width + gap
    return joined


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'paths', type=Path, nargs='+', metavar='PATH', help='DIR IMAGE_OR_FOLDER, once or more'
    )
    parser.add_argument(
        '--screenshot', type=Path, metavar='PNG', help='save a picture of the pages: see SCREENS'
    )
    args = parser.parse_args()
    if len(args.paths) % 2:
        parser.error('give pairs of a bundle and an image or folder')
    pairs = [(path, predict.find_images(images)) for path, images in zip(args.paths[::2], args.paths[1::2])]
    problems = []
    with launch() as chromium:
        for bundle, images in pairs:
            with open_bundle(chromium, bundle, **SCREENS[0]) as browser:
                problems += compare(browser, predict.Model(bundle, 'web', 1), images)
                print('milliseconds of the model in the last picture:', browser.page.inner_text('#ms-run'))
        if args.screenshot:
            shots = []
            for i, settings in enumerate(SCREENS):
                bundle, images = pairs[min(i // 2, len(pairs) - 1)]
                with open_bundle(chromium, bundle, **settings) as browser:
                    shots.append(shoot(browser, images[0], settings))
                    problems += browser.errors
            side_by_side(shots).save(args.screenshot, optimize=True)
    for problem in problems:
        print(f'error: {problem}', file=sys.stderr)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
