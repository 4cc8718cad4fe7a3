// Turns the outputs of a model into what predict.py gives: objects, classes or segments, in its JSON form.

const TOP = 5; // classes of a classifier that are listed

const round = (x, digits) => Number(x.toFixed(digits));
const nameOf = (label, meta) => meta.classes[label] ?? String(label);

/** Indices of values, largest first; equal ones keep their order. */
const byValue = (values) => Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);

// ---------------------------------------------------------------------------------------------- classifiers

/** The best classes. */
export function readClasses(probabilities, meta) {
  return byValue(probabilities)
    .slice(0, TOP)
    .map((label) => ({
      class: nameOf(label, meta),
      label,
      score: round(probabilities[label], 4),
    }));
}

// ---------------------------------------------------------------------------------------------- detectors

/**
 * Objects with a score of at least `scoreThr`, best first, boxes in pixels of the picture.
 *
 * `outputs` has dets (1, K, 5), labels (1, K) and perhaps masks (1, K, m, m); `prepared` is what prepare()
 * gave. Of a model with masks each object gets `region`, the part of the picture that its mask lies in.
 */
export function readObjects(outputs, prepared, meta, scoreThr) {
  const { dets, labels, masks } = outputs;
  const [width, height] = prepared.size;
  const most = [width, height, width, height];
  const scale = [...prepared.scale, ...prepared.scale].map(Math.fround);
  const found = [];
  for (let i = 0; i < labels.data.length; i++) {
    const [score, label] = [dets.data[5 * i + 4], Number(labels.data[i])];
    if (label < 0 || score < scoreThr) continue; // -1: an unused row
    const box = scale.map((factor, j) => {
      const at = Math.fround(dets.data[5 * i + j] / factor);
      return Math.min(Math.max(at, 0), most[j]);
    });
    if (box[2] <= box[0] || box[3] <= box[1]) continue;
    const item = { class: nameOf(label, meta), label, score: round(score, 4) };
    item.box = box.map((x) => round(x, 2));
    if (masks) {
      const side = masks.dims[3];
      const mask = masks.data.subarray(i * side * side, (i + 1) * side * side);
      item.region = pasteMask(mask, side, box, width, height, meta.mask_thr);
      item.mask = encodeMask(item.region, width, height);
    }
    found.push(item);
  }
  return found.sort((a, b) => b.score - a.score); // the model gives them in this order but for ties
}

/** Where the mask (side, side) of a box covers the picture: {x, y, width, height, data of 0 or 1}. */
function pasteMask(mask, side, [x1, y1, x2, y2], width, height, threshold) {
  const x = Math.max(Math.floor(x1) - 1, 0);
  const y = Math.max(Math.floor(y1) - 1, 0);
  const right = Math.min(Math.ceil(x2) + 1, width);
  const bottom = Math.min(Math.ceil(y2) + 1, height);
  const region = { x, y, width: right - x, height: bottom - y };
  region.data = new Uint8Array(region.width * region.height);
  // Bilinear sampling; outside of the mask there is nothing.
  const value = (row, column) =>
    row < 0 || column < 0 || row >= side || column >= side ? 0 : mask[row * side + column];
  for (let i = 0, k = 0; i < region.height; i++) {
    const v = ((y + i + 0.5 - y1) / (y2 - y1)) * side - 0.5;
    const [row, b] = [Math.floor(v), v - Math.floor(v)];
    for (let j = 0; j < region.width; j++, k++) {
      const u = ((x + j + 0.5 - x1) / (x2 - x1)) * side - 0.5;
      const [column, a] = [Math.floor(u), u - Math.floor(u)];
      const above = value(row, column) * (1 - a) + value(row, column + 1) * a;
      const below = value(row + 1, column) * (1 - a) + value(row + 1, column + 1) * a;
      region.data[k] = above * (1 - b) + below * b >= threshold ? 1 : 0;
    }
  }
  return region;
}

/** COCO's compressed run-length encoding of a mask in a picture: runs along the columns, zeros first. */
function encodeMask({ x, y, width, height, data }, pictureWidth, pictureHeight) {
  const counts = [];
  let [current, start] = [0, 0];
  const set = (value, at) => {
    if (value === current) return;
    counts.push(at - start);
    [current, start] = [value, at];
  };
  for (let j = 0; j < width; j++) {
    const column = (x + j) * pictureHeight;
    if (y > 0) set(0, column);
    for (let i = 0; i < height; i++) set(data[i * width + j], column + y + i);
    if (y + height < pictureHeight) set(0, column + y + height);
  }
  if (x + width < pictureWidth) set(0, (x + width) * pictureHeight);
  const size = pictureWidth * pictureHeight;
  if (start < size) counts.push(size - start);
  let text = '';
  counts.forEach((count, i) => {
    let rest = i > 2 ? count - counts[i - 2] : count;
    for (let more = true; more; ) {
      let bits = rest & 0x1f;
      rest >>= 5;
      more = rest !== (bits & 0x10 ? -1 : 0);
      if (more) bits |= 0x20;
      text += String.fromCharCode(bits + 48);
    }
  });
  return { size: [pictureHeight, pictureWidth], counts: text };
}

// ---------------------------------------------------------------------------------------------- segmentors

/** The rows of torch's bilinear interpolation from `old` to `size` places: old place -> weight. */
function interpolation(old, size, alignCorners) {
  return Array.from({ length: size }, (_, i) => {
    const place = alignCorners
      ? i * ((old - 1) / Math.max(size - 1, 1))
      : Math.max((i + 0.5) * (old / size) - 0.5, 0);
    const first = Math.min(Math.floor(place), old - 1);
    const share = place - first;
    const row = new Map([[first, 1 - share]]);
    const second = Math.min(first + 1, old - 1);
    row.set(second, (row.get(second) ?? 0) + share);
    return row;
  });
}

/** From logits to the picture along one axis: to the model's input, without the padding, to the picture. */
function enlargement(old, input, valid, size, alignCorners) {
  const inside = interpolation(old, input, alignCorners).slice(0, valid);
  return interpolation(valid, size, alignCorners).map((row) => {
    const found = new Map();
    for (const [place, weight] of row) {
      for (const [source, share] of inside[place]) {
        found.set(source, (found.get(source) ?? 0) + weight * share);
      }
    }
    const used = Array.from(found).filter(([, weight]) => weight !== 0);
    return { places: used.map(([place]) => place), weights: used.map(([, weight]) => weight) };
  });
}

/**
 * The class of each pixel: {width, height, data}, from logits (1, C, h, w).
 *
 * The logits are enlarged before the best class is taken, as MMSegmentation does. A picture with a side of
 * more than `longest` pixels gets a smaller map.
 */
export function readMap(logits, prepared, meta, longest) {
  const [, classes, h, w] = logits.dims;
  const shrink = Math.min(1, longest / Math.max(...prepared.size));
  const [width, height] = prepared.size.map((n) => Math.max(1, Math.round(n * shrink)));
  const corners = meta.align_corners;
  const rows = enlargement(h, prepared.height, prepared.valid[1], height, corners);
  const columns = enlargement(w, prepared.width, prepared.valid[0], width, corners);
  const least = meta.binary_thr ? Math.log(meta.binary_thr / (1 - meta.binary_thr)) : 0;
  const data = classes > 256 ? new Uint16Array(width * height) : new Uint8Array(width * height);
  const line = new Float32Array(w * classes); // a row of the picture, not yet widened: w x classes
  for (let y = 0, i = 0; y < height; y++) {
    line.fill(0);
    rows[y].places.forEach((place, k) => {
      const weight = rows[y].weights[k];
      for (let c = 0; c < classes; c++) {
        const start = (c * h + place) * w;
        for (let x = 0; x < w; x++) line[x * classes + c] += weight * logits.data[start + x];
      }
    });
    for (let x = 0; x < width; x++, i++) {
      const { places, weights } = columns[x];
      let [best, label] = [-Infinity, 0];
      for (let c = 0; c < classes; c++) {
        let sum = 0;
        for (let k = 0; k < places.length; k++) sum += weights[k] * line[places[k] * classes + c];
        if (sum > best) [best, label] = [sum, c];
      }
      data[i] = classes === 1 ? Number(best > least) : label;
    }
  }
  return { width, height, data };
}

/** The classes in a map with their shares of the pixels, largest first. */
export function readSegments(map, meta) {
  const counts = [];
  for (const label of map.data) counts[label] = (counts[label] ?? 0) + 1;
  const labels = Object.keys(counts).map(Number);
  return labels
    .sort((a, b) => counts[b] - counts[a] || a - b)
    .map((label) => ({
      class: nameOf(label, meta),
      label,
      share: round(counts[label] / map.data.length, 4),
    }));
}
