// Runs the model, in a thread of its own so that the page stays alive.
//
// In:  {type: 'load', meta, entry, backend: 'wasm' or 'webgpu'}
//      {type: 'run', id, picture: a Blob or an ImageBitmap, scoreThr}
//      {type: 'filter', id, scoreThr}: the last picture again, with another threshold
// Out: {type: 'progress', loaded, total}, {type: 'ready', threads},
//      {type: 'result', id, result, view, bitmap, ms: {prepare, run, answer}},
//      {type: 'error', id, stage: 'load', 'read' or 'run', message}

import { readClasses, readMap, readObjects, readSegments } from './answers.js';
import { dropAlpha, prepare } from './image.js';

// onnxruntime-web: its script and its WebAssembly, in ort/.
const BACKENDS = {
  wasm: ['ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm'],
  webgpu: ['ort.webgpu.bundle.min.mjs', 'ort-wasm-simd-threaded.asyncify.wasm'],
};
const MOST_PIXELS = 16777216; // of a canvas on some phones; a larger picture is shrunk first
const LONGEST_MAP = 1600; // pixels of the longer side of a class map

let ort, session, meta, entry;
let last; // what answers are made of: outputs and the prepared picture

/** Fetch files, and report how much has come; their contents. */
async function download(paths) {
  const responses = await Promise.all(paths.map((path) => fetch(new URL(path, import.meta.url))));
  for (const response of responses) {
    if (!response.ok) throw new Error(`${response.url}: ${response.status} ${response.statusText}`);
  }
  const total = responses.reduce((sum, r) => sum + Number(r.headers.get('content-length')), 0);
  let loaded = 0;
  const read = async (response) => {
    const parts = [];
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      parts.push(part.value);
      loaded += part.value.length;
      postMessage({ type: 'progress', loaded, total });
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  };
  return Promise.all(responses.map(read));
}

async function load(message) {
  ({ meta, entry } = message);
  const [script, wasm] = BACKENDS[message.backend];
  const [model, wasmBinary] = await download([`../${entry.files[0]}`, `ort/${wasm}`]);
  ort = await import(`./ort/${script}`);
  ort.env.wasm.wasmBinary = wasmBinary.buffer;
  // Threads share memory, which browsers allow only to pages that the server declares isolated.
  const cores = Math.min(4, navigator.hardwareConcurrency || 1);
  ort.env.wasm.numThreads = crossOriginIsolated ? cores : 1;
  ort.env.logLevel = 'error';
  session = await ort.InferenceSession.create(model, {
    executionProviders: [message.backend],
    logSeverityLevel: 3, // errors; warnings would appear as errors in the console
  });
  postMessage({ type: 'ready', threads: ort.env.wasm.numThreads });
}

/** A picture as a bitmap, upright, with its colors as they are in the file. */
async function decode(picture) {
  if (!(picture instanceof Blob)) return picture;
  const options = { imageOrientation: 'from-image', colorSpaceConversion: 'none' };
  const bitmap = await createImageBitmap(picture, options);
  const shrink = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  if (shrink >= 1) return bitmap;
  return createImageBitmap(bitmap, {
    resizeWidth: Math.floor(bitmap.width * shrink),
    resizeHeight: Math.floor(bitmap.height * shrink),
    resizeQuality: 'high',
  });
}

function pixelsOf(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return dropAlpha(context.getImageData(0, 0, bitmap.width, bitmap.height));
}

/** What was found: `result`, as predict.py has it in JSON, and `view`, what only the drawing needs. */
function answer(scoreThr) {
  const { outputs, prepared } = last;
  const [width, height] = prepared.size;
  const result = { width, height };
  const view = {};
  if (entry.answers === 'probabilities') {
    result.classes = readClasses(outputs.probabilities.data, meta);
  } else if (entry.answers === 'map') {
    view.map = readMap(outputs.logits, prepared, meta, LONGEST_MAP);
    result.segments = readSegments(view.map, meta);
  } else {
    const objects = readObjects(outputs, prepared, meta, scoreThr);
    view.regions = objects.map((item) => item.region);
    result.objects = objects.map(({ region, ...item }) => item);
  }
  return { result, view };
}

async function run({ id, picture, scoreThr }) {
  let bitmap, prepared;
  const begun = performance.now();
  try {
    bitmap = await decode(picture);
  } catch (error) {
    postMessage({ type: 'error', id, stage: 'read', message: error.message });
    return;
  }
  prepared = prepare(pixelsOf(bitmap), meta);
  const [height, width] = [prepared.height, prepared.width];
  const input = new ort.Tensor('uint8', prepared.data, [1, height, width, 3]);
  delete prepared.data;
  const ready = performance.now();
  // Of a segmentor the logits: the class map is made of them at the size of the picture.
  const wanted = entry.answers === 'map' ? ['logits'] : session.outputNames;
  const outputs = await session.run({ [entry.input.name]: input }, wanted);
  const done = performance.now();
  last = { outputs, prepared };
  const found = answer(scoreThr);
  const ms = { prepare: ready - begun, run: done - ready, answer: performance.now() - done };
  postMessage({ type: 'result', id, ...found, bitmap, ms }, [bitmap]);
}

const HANDLERS = {
  load,
  run,
  filter: ({ id, scoreThr }) => postMessage({ type: 'result', id, ...answer(scoreThr) }),
};

// One after another: a session cannot run twice at once.
let queue = Promise.resolve();
addEventListener('message', ({ data }) => {
  queue = queue
    .then(() => HANDLERS[data.type](data))
    .catch((error) => {
      const stage = data.type === 'load' ? 'load' : 'run';
      postMessage({ type: 'error', id: data.id, stage, message: error.message ?? String(error) });
    });
});
