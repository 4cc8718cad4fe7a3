// The page: takes pictures from files, the clipboard and the camera, asks the worker, and shows what it finds.
// `window.lastResult` has the last answer, in the form of predict.py's JSON, for tests.

import { colorOf, draw } from './draw.js';

const TASKS = {
  detection: 'Object detection',
  'instance segmentation': 'Instance segmentation',
  segmentation: 'Semantic segmentation',
  classification: 'Image classification',
};
const PAUSE = 3000; // milliseconds between announcements while the camera runs

const ui = Object.fromEntries(Array.from(document.querySelectorAll('[id]'), (e) => [e.id, e]));

let meta, models, worker;
let shown = null; // {bitmap, result, view, ms}
let marked = null; // index of the object, or number of the class, that the pointer is on
let stream = null; // of the camera
let announced = 0; // when

// ---------------------------------------------------------------------------------------------- the worker

let number = 0;
const waiting = new Map(); // id -> [resolve, reject]

/** Ask the worker; the answer. */
function ask(message, transfer = []) {
  const id = ++number;
  worker.postMessage({ ...message, id, scoreThr: Number(ui.score.value) }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, [resolve, reject]));
}

function receive({ data }) {
  if (data.type === 'progress') {
    showProgress(data.loaded, data.total);
  } else if (data.type === 'ready') {
    showReady(data.threads);
  } else {
    const [resolve, reject] = waiting.get(data.id) ?? [() => {}, showError];
    waiting.delete(data.id);
    if (data.type === 'error') reject(new Error(explain(data)));
    else resolve(data);
  }
}

function explain({ stage, message }) {
  if (stage === 'read') return 'This browser cannot read that file as a picture.';
  return `The model cannot be ${stage === 'load' ? 'loaded' : 'run'}: ${message}`;
}

/** Start a worker with the chosen model; an earlier one ends. */
function start() {
  stopCamera();
  worker?.terminate();
  for (const [, reject] of waiting.values()) reject(null); // nobody answers any more
  waiting.clear();
  enable(false);
  ui.canvas.hidden = true;
  ui.hint.hidden = false;
  ui['hint-text'].classList.remove('delayed');
  ui['hint-text'].textContent = 'Loading the model';
  ui.progress.hidden = false;
  ui.progress.removeAttribute('value');
  ui.status.textContent = 'Loading the model';
  showError(null);
  const entry = models[ui.model.value];
  worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
  worker.addEventListener('message', receive);
  worker.addEventListener('error', (event) => showError(new Error(event.message || 'The worker cannot start.')));
  worker.postMessage({ type: 'load', meta, entry, backend: ui.backend.value });
  showAbout(entry);
}

// ---------------------------------------------------------------------------------------------- showing

function showError(error) {
  ui.error.textContent = error ? error.message : '';
  ui.error.hidden = !error;
  if (error) ui.progress.hidden = true;
}

function showProgress(loaded, total) {
  const MB = (bytes) => (bytes / 1e6).toFixed(1);
  ui['hint-text'].textContent = `Loading the model: ${MB(loaded)} MB`;
  if (total) {
    ui.progress.value = Math.min(1, loaded / total);
    ui['hint-text'].textContent = `Loading the model: ${MB(loaded)} of ${MB(Math.max(loaded, total))} MB`;
  }
}

function showReady(threads) {
  ui.progress.hidden = true;
  ui['hint-text'].textContent = 'Choose a picture, drop one here, or use the camera.';
  ui.status.textContent = 'Ready';
  document.getElementById('threads').textContent = threads;
  enable(true);
  showExample();
}

function enable(on) {
  for (const id of ['file', 'camera', 'example']) ui[id].disabled = !on;
}

function showAbout(entry) {
  const { input } = entry;
  const size = input.shape.slice(1, 3).map((n) => (typeof n === 'number' ? n : 'any'));
  const rows = [
    ['Name', meta.name],
    ['Classes', meta.classes.length],
    ['Input', `${size[1]} × ${size[0]} pixels`],
    ['Precision', entry.precision],
    ['Threads', '', 'threads'],
    ['Error against PyTorch', entry.error],
    ['Exported by', `emo2_mm ${meta.versions.emo2_mm}`],
  ];
  ui.about.replaceChildren(
    ...rows.flatMap(([name, value, id]) => {
      const [dt, dd] = [document.createElement('dt'), document.createElement('dd')];
      dt.textContent = name;
      dd.textContent = value;
      if (id) dd.id = id;
      return [dt, dd];
    }),
  );
}

/** What was found, in a sentence. */
function summarize(result) {
  const percent = (x) => `${Math.round(100 * x)} %`;
  if (result.classes) return `${result.classes[0].class} (${percent(result.classes[0].score)})`;
  if (result.segments) {
    const parts = result.segments.slice(0, 3).map((item) => `${percent(item.share)} ${item.class}`);
    return parts.join(', ');
  }
  const counts = new Map();
  for (const item of result.objects) counts.set(item.class, (counts.get(item.class) ?? 0) + 1);
  if (!counts.size) return 'Nothing found';
  const parts = Array.from(counts, ([name, count]) => (count === 1 ? name : `${count}\u00a0×\u00a0${name}`));
  const total = result.objects.length;
  return `${total} ${total === 1 ? 'object' : 'objects'}: ${parts.join(', ')}`;
}

function element(name, className, text = '') {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** A line of the list: color, name, bar and value of an object, class or segment. */
function line(item, index, result) {
  const share = item.score ?? item.share;
  const row = element('li', '');
  const swatch = element('span', 'swatch');
  swatch.style.background = colorOf(item.label, meta.palette);
  const bar = element('span', 'bar');
  bar.append(element('span', ''));
  bar.firstChild.style.width = `${100 * share}%`;
  const value = item.share === undefined ? share.toFixed(2) : `${(100 * share).toFixed(1)} %`;
  row.append(swatch, element('span', 'name', item.class), bar, element('span', 'value', value));
  if (!result.classes) {
    const mark = (value) => {
      marked = value;
      redraw();
    };
    row.addEventListener('pointerenter', () => mark(result.segments ? item.label : index));
    row.addEventListener('pointerleave', () => mark(null));
  }
  return row;
}

function showResult() {
  const { result, ms } = shown;
  const items = result.objects ?? result.classes ?? result.segments;
  marked = null;
  const text = summarize(result);
  if (!stream || Date.now() - announced > PAUSE) {
    ui.status.textContent = text; // a live region: screen readers say it
    announced = Date.now();
  }
  ui.canvas.setAttribute('aria-label', `The picture. ${text}`);
  ui.list.replaceChildren(...items.map((item, index) => line(item, index, result)));
  const show = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  ui['ms-run'].textContent = show(ms.run);
  ui['ms-prepare'].textContent = show(ms.prepare);
  ui['ms-total'].textContent = show(ms.prepare + ms.run + ms.answer);
  ui.json.textContent = JSON.stringify(result, null, 1);
  window.lastResult = result;
  redraw();
}

function redraw() {
  if (!shown) return;
  ui.canvas.hidden = false;
  ui.hint.hidden = true;
  const room = { width: ui.picture.clientWidth, height: ui.picture.clientHeight };
  draw(ui.canvas, shown.bitmap, shown, meta, { room, opacity: Number(ui.opacity.value), marked });
}

// ---------------------------------------------------------------------------------------------- pictures

/** Run the model on a file or a frame, and show the result; whether that worked. */
async function run(picture) {
  const transfer = picture instanceof ImageBitmap ? [picture] : [];
  ui.picture.setAttribute('aria-busy', 'true');
  try {
    const { bitmap, result, view, ms } = await ask({ type: 'run', picture }, transfer);
    shown?.bitmap.close();
    shown = { bitmap, result, view, ms };
    showError(null);
    showResult();
    return true;
  } catch (error) {
    if (error) showError(error);
    return false;
  } finally {
    ui.picture.removeAttribute('aria-busy');
  }
}

function take(files) {
  const file = Array.from(files ?? [])[0];
  if (!file || ui.file.disabled) return;
  stopCamera();
  run(file);
}

async function showExample() {
  stopCamera();
  const response = await fetch(new URL('example.png', import.meta.url));
  if (response.ok) await run(await response.blob());
}

// ---------------------------------------------------------------------------------------------- the camera

async function startCamera() {
  const video = document.createElement('video');
  video.muted = video.playsInline = true;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
  } catch (error) {
    showError(new Error(`The camera cannot be used: ${error.message}`));
    return;
  }
  const own = stream;
  ui.camera.setAttribute('aria-pressed', 'true');
  ui.camera.lastElementChild.textContent = 'Stop';
  video.srcObject = stream;
  try {
    await video.play();
    let works = true;
    while (works && stream === own) works = await run(await createImageBitmap(video));
  } catch (error) {
    showError(new Error(`The camera has stopped: ${error.message}`));
  }
  for (const track of own.getTracks()) track.stop();
  if (stream === own) stopCamera();
}

function stopCamera() {
  if (stream && shown) ui.status.textContent = summarize(shown.result); // it may not have been announced yet
  stream = null; // the loop ends, and the camera with it
  ui.camera.setAttribute('aria-pressed', 'false');
  ui.camera.lastElementChild.textContent = 'Camera';
}

/** Browsers give video only to safe origins (https, localhost); elsewhere a phone's camera app takes a photo. */
const hasVideo = () => Boolean(navigator.mediaDevices?.getUserMedia);

// ---------------------------------------------------------------------------------------------- controls

function listen() {
  for (const input of [ui.file, ui.snapshot]) {
    input.addEventListener('change', () => {
      take(input.files);
      input.value = ''; // the same file may be chosen again
    });
  }
  ui.camera.addEventListener('click', () => {
    if (stream) stopCamera();
    else if (hasVideo()) startCamera();
    else ui.snapshot.click();
  });
  ui.camera.hidden = !hasVideo() && !matchMedia('(pointer: coarse)').matches;
  ui.example.addEventListener('click', showExample);
  document.addEventListener('visibilitychange', () => document.hidden && stopCamera());

  addEventListener('paste', (event) => take(event.clipboardData?.files));
  let depth = 0; // the pointer enters and leaves children, too
  const drag = (change) => (event) => {
    event.preventDefault();
    depth = Math.max(0, depth + change);
    document.body.classList.toggle('dragging', depth > 0);
  };
  addEventListener('dragenter', drag(1));
  addEventListener('dragleave', drag(-1));
  addEventListener('dragover', (event) => event.preventDefault());
  addEventListener('drop', (event) => {
    drag(-depth)(event);
    take(event.dataTransfer?.files);
  });

  ui.score.addEventListener('input', async () => {
    showScore();
    if (!shown) return;
    const bitmap = shown.bitmap;
    const { result, view } = await ask({ type: 'filter' });
    if (shown.bitmap !== bitmap) return; // another picture has come
    shown = { ...shown, result, view };
    showResult();
  });
  ui.opacity.addEventListener('input', () => {
    ui['opacity-value'].textContent = `${Math.round(100 * ui.opacity.value)} %`;
    redraw();
  });
  ui.model.addEventListener('change', start);
  ui.backend.addEventListener('change', start);
  ui.copy.addEventListener('click', async () => {
    const range = document.createRange();
    range.selectNodeContents(ui.json);
    getSelection().removeAllRanges();
    getSelection().addRange(range); // where the clipboard is closed to pages, it is ready to be copied
    await navigator.clipboard?.writeText(ui.json.textContent);
    ui.copy.textContent = navigator.clipboard ? 'Copied' : 'Selected';
    setTimeout(() => (ui.copy.textContent = 'Copy'), 2000);
  });
  new ResizeObserver(redraw).observe(ui.picture);
}

function showScore() {
  ui['score-value'].textContent = Number(ui.score.value).toFixed(2);
}

/** Offer the GPU if its files are here and the browser has one. */
async function offerBackends() {
  if (!(await navigator.gpu?.requestAdapter())) return;
  const response = await fetch(new URL('ort/ort.webgpu.bundle.min.mjs', import.meta.url), { method: 'HEAD' });
  await response.text(); // a request whose answer is not read counts as aborted
  ui['backend-row'].hidden = !response.ok;
}

async function main() {
  const response = await fetch(new URL('../model.json', import.meta.url));
  if (!response.ok) throw new Error(`model.json: ${response.status} ${response.statusText}`);
  meta = await response.json();
  models = Object.fromEntries(Object.entries(meta.models).filter(([, entry]) => entry.runtime === 'web'));
  ui.title.textContent = TASKS[meta.task];
  document.title = `${TASKS[meta.task]}: ${meta.name}`;
  const count = meta.classes.length;
  ui.subtitle.textContent = `${meta.name} · ${count} ${count === 1 ? 'class' : 'classes'}`;
  ui.model.replaceChildren(
    ...Object.entries(models).map(([name, { precision }]) => new Option(precision, name)),
  );
  ui['model-row'].hidden = ui.model.length < 2;
  ui['score-row'].hidden = meta.score_thr === undefined;
  if (meta.score_thr !== undefined) ui.score.value = meta.score_thr;
  ui['opacity-row'].hidden = meta.task !== 'segmentation';
  showScore();
  listen();
  start();
  await offerBackends();
}

main().catch(showError);
