// Prepares a picture for the model exactly as predict.py does: the same steps of model.json, the same
// rounding. A picture is {data: Uint8Array, width, height}, three bytes a pixel in the order R, G, B.

/** Round half to even, as Python and NumPy do. */
function round(x) {
  const down = Math.floor(x);
  if (x - down !== 0.5) return Math.round(x);
  return down % 2 === 0 ? down : down + 1;
}

/** The three colors of RGBA bytes, as a canvas gives them; alpha is dropped. */
export function dropAlpha({ data, width, height }) {
  const found = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; j < found.length; i += 4, j += 3) {
    found[j] = data[i];
    found[j + 1] = data[i + 1];
    found[j + 2] = data[i + 2];
  }
  return { data: found, width, height };
}

// ---------------------------------------------------------------------------------------------- resizing

/** For each new place along an axis: its two old neighbors and their weights in 1/2048, as in OpenCV. */
function neighbors(old, size) {
  const first = new Int32Array(size);
  const second = new Int32Array(size);
  const a = new Int32Array(size);
  const b = new Int32Array(size);
  for (let i = 0; i < size; i++) {
    const x = Math.fround((i + 0.5) * (1 / (size / old)) - 0.5);
    const floor = Math.floor(x);
    const share = Math.fround(x - floor);
    a[i] = round(Math.fround(1 - share) * 2048);
    b[i] = round(share * 2048);
    first[i] = Math.min(Math.max(floor, 0), old - 1);
    second[i] = Math.min(Math.max(floor + 1, 0), old - 1);
  }
  return { first, second, a, b };
}

/** OpenCV's INTER_LINEAR in its fixed-point arithmetic. */
function resizeBilinear(image, width, height) {
  const across = neighbors(image.width, width);
  const down = neighbors(image.height, height);
  const found = new Uint8Array(width * height * 3);
  const stretch = (y) => {
    const row = new Int32Array(width * 3);
    const start = y * image.width;
    for (let x = 0, j = 0; x < width; x++) {
      const left = (start + across.first[x]) * 3;
      const right = (start + across.second[x]) * 3;
      for (let c = 0; c < 3; c++, j++) {
        row[j] = (image.data[left + c] * across.a[x] + image.data[right + c] * across.b[x]) >> 4;
      }
    }
    return row;
  };
  let rows = new Map(); // the two old rows in use, stretched to the new width
  for (let y = 0, j = 0; y < height; y++) {
    const [above, below] = [down.first[y], down.second[y]];
    const top = rows.get(above) ?? stretch(above);
    const bottom = above === below ? top : (rows.get(below) ?? stretch(below));
    rows = new Map([[above, top], [below, bottom]]);
    for (let x = 0; x < top.length; x++, j++) {
      found[j] = (((top[x] * down.a[y]) >> 16) + ((bottom[x] * down.b[y]) >> 16) + 2) >> 2;
    }
  }
  return { data: found, width, height };
}

/** The old pixel of each new one, from the old places along both axes. */
function pick(image, columns, rows) {
  const [width, height] = [columns.length, rows.length];
  const found = new Uint8Array(width * height * 3);
  for (let y = 0, j = 0; y < height; y++) {
    for (let x = 0; x < width; x++, j += 3) {
      const i = (rows[y] * image.width + columns[x]) * 3;
      found[j] = image.data[i];
      found[j + 1] = image.data[i + 1];
      found[j + 2] = image.data[i + 2];
    }
  }
  return { data: found, width, height };
}

/** OpenCV's INTER_NEAREST: the pixel at the corner of the new one. */
function resizeNearest(image, width, height) {
  const places = (old, size) =>
    Array.from({ length: size }, (_, i) => Math.min(Math.floor(i * (1 / (size / old))), old - 1));
  return pick(image, places(image.width, width), places(image.height, height));
}

/** Pillow's NEAREST: the pixel at the center of the new one, found by adding steps as Pillow does. */
function resizeNearestPillow(image, width, height) {
  const places = (old, size) => {
    let at = (old / size) * 0.5;
    return Array.from({ length: size }, () => {
      const place = Math.floor(at);
      at += old / size;
      return Math.min(place, old - 1);
    });
  };
  return pick(image, places(image.width, width), places(image.height, height));
}

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Pillow's filters: how far they reach, and the weight at a distance.
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
  bicubic: [
    2,
    (x) => {
      const t = Math.abs(x);
      if (t < 1) return (1.5 * t - 2.5) * t * t + 1;
      return t < 2 ? ((-0.5 * t + 2.5) * t - 4) * t + 2 : 0;
    },
  ],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** For each new place along an axis: the first old place, and the weights from there in 1/2^22. */
function windows(old, size, [reach, weigh]) {
  const scale = old / size;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: size }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach * stretch + 0.5));
    const last = Math.min(old, Math.trunc(center + reach * stretch + 0.5));
    const weights = [];
    for (let x = first; x < last; x++) weights.push(weigh((x - center + 0.5) * (1 / stretch)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return {
      first,
      weights: weights.map((w) => Math.trunc((w / sum) * 4194304 + Math.sign(w / sum) * 0.5)),
    };
  });
}

/** One pass of Pillow's resampling: along an axis whose neighbors are `step` bytes apart. */
function filter(source, target, places, step, lines) {
  for (let place = 0; place < places.length; place++) {
    const { first, weights } = places[place];
    for (const [from, to] of lines(place)) {
      let sum = 2097152;
      for (let k = 0, i = from + first * step; k < weights.length; k++, i += step) {
        sum += source[i] * weights[k];
      }
      target[to] = Math.min(255, Math.max(0, Math.floor(sum / 4194304)));
    }
  }
}

/**
 * Pillow's resampling, with antialiasing: first along the rows, then along the columns.
 *
 * Pillow 13 swaps them where a picture loses more than twice as many rows as columns; the pixels then differ
 * by a few levels.
 */
function resizePillow(image, width, height, kind) {
  let found = image;
  if (width !== image.width) {
    const data = new Uint8Array(width * image.height * 3);
    filter(image.data, data, windows(image.width, width, kind), 3, function* (x) {
      for (let y = 0; y < image.height; y++) {
        for (let c = 0; c < 3; c++) yield [y * image.width * 3 + c, (y * width + x) * 3 + c];
      }
    });
    found = { data, width, height: image.height };
  }
  if (height !== image.height) {
    const data = new Uint8Array(width * height * 3);
    filter(found.data, data, windows(image.height, height, kind), width * 3, function* (y) {
      for (let i = 0; i < width * 3; i++) yield [i, y * width * 3 + i];
    });
    found = { data, width, height };
  }
  return found;
}

/** Resize by the rule of a step: `backend` cv2 or pillow, `interpolation`. */
function resize(image, width, height, step) {
  if (image.width === width && image.height === height) return image;
  if (step.backend === 'pillow') {
    if (step.interpolation === 'nearest') return resizeNearestPillow(image, width, height);
    return resizePillow(image, width, height, FILTERS[step.interpolation]);
  }
  if (step.interpolation === 'nearest') return resizeNearest(image, width, height);
  return resizeBilinear(image, width, height);
}

// ---------------------------------------------------------------------------------------------- steps

/** Pad at right and bottom to at least width x height with a value, or one a channel. */
function pad(image, width, height, value) {
  width = Math.max(width, image.width);
  height = Math.max(height, image.height);
  if (width === image.width && height === image.height) return image;
  const values = Array.isArray(value) ? value : [value, value, value];
  const data = new Uint8Array(width * height * 3);
  for (let i = 0; i < data.length; i++) data[i] = values[i % 3];
  for (let y = 0; y < image.height; y++) {
    data.set(image.data.subarray(y * image.width * 3, (y + 1) * image.width * 3), y * width * 3);
  }
  return { data, width, height };
}

/** One step of model.json's `preprocess`; predict.py (`apply_step`) says what each does. */
export function applyStep(image, step) {
  const { width, height } = image;
  if (step.op === 'resize') {
    if (step.scale && !step.keep_ratio) return resize(image, step.scale[0], step.scale[1], step);
    let { factor } = step;
    if (factor === undefined) {
      const [long, short] = [Math.max(...step.scale), Math.min(...step.scale)];
      factor = Math.min(long / Math.max(height, width), short / Math.min(height, width));
    }
    if (step.fit) factor = Math.min(factor, step.fit[0] / width, step.fit[1] / height);
    const scaled = (n) => Math.max(1, Math.trunc(n * factor + 0.5));
    return resize(image, scaled(width), scaled(height), step);
  }
  if (step.op === 'resize_edge') {
    const { edge, scale } = step;
    const byWidth = (edge === 'short' && width < height) || (edge === 'long' && width > height);
    if (byWidth || edge === 'width') {
      return resize(image, scale, Math.trunc((scale * height) / width), step);
    }
    return resize(image, Math.trunc((scale * width) / height), scale, step);
  }
  if (step.op === 'center_crop') {
    const [newWidth, newHeight] = [Math.min(step.size[0], width), Math.min(step.size[1], height)];
    const left = Math.max(0, round((width - newWidth) / 2));
    const top = Math.max(0, round((height - newHeight) / 2));
    return pick(
      image,
      Array.from({ length: newWidth }, (_, x) => left + x),
      Array.from({ length: newHeight }, (_, y) => top + y),
    );
  }
  if (step.op === 'pad') {
    let size = step.square ? [Math.max(width, height), Math.max(width, height)] : [width, height];
    if (step.size) size = step.size;
    if (step.divisor) size = size.map((n) => Math.ceil(n / step.divisor) * step.divisor);
    return pad(image, size[0], size[1], step.value);
  }
  throw new Error(`model.json: unknown step ${step.op} in "preprocess"`);
}

/**
 * Prepare a picture for a model.
 *
 * Returns {data, width, height}, the input of the model in its order of colors, and what maps results back
 * to the picture as it was: `size` of that picture, `valid`, the part of the input that is not padding, and
 * `scale`, the factors by which width and height were multiplied. Each is [width, height].
 */
export function prepare(picture, meta) {
  let image = picture;
  const scale = [1, 1];
  for (const step of meta.preprocess) {
    const old = image;
    image = applyStep(image, step);
    if (step.op.startsWith('resize')) {
      scale[0] = (scale[0] * image.width) / old.width;
      scale[1] = (scale[1] * image.height) / old.height;
    }
  }
  const valid = [image.width, image.height];
  if (meta.color_order === 'BGR') {
    const data = image.data.slice();
    for (let i = 0; i < data.length; i += 3) [data[i], data[i + 2]] = [data[i + 2], data[i]];
    image = { ...image, data };
  }
  if (meta.input_size) {
    const [height, width] = meta.input_size;
    image = pad(image, width, height, meta.mean.map(round)); // the mean color is zero once normalized
    if (image.width !== width || image.height !== height) {
      throw new Error(`the prepared picture is ${image.width} x ${image.height}, not ${width} x ${height}`);
    }
  }
  return { ...image, size: [picture.width, picture.height], valid, scale };
}
