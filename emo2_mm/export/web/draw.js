// Draws a picture and what was found in it.

/** The color of a class: the model's own, or hues that differ. */
export function colorOf(label, palette) {
  if (palette.length) return `rgb(${palette[label % palette.length].join(' ')})`;
  return `hsl(${(label * 137.508 + 350) % 360} 85% 55%)`;
}

/** Its red, green and blue; a canvas translates what CSS knows. */
function componentsOf(color) {
  const context = new OffscreenCanvas(1, 1).getContext('2d');
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data;
}

/** Black or white, whichever is legible on a color. */
function inkOn([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? '#000' : '#fff';
}

/** Pixels that have the color of their value; those of value `skip` stay clear. */
function paint({ width, height, data }, colors, skip) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const values = colors.map((color) => new Uint32Array(componentsOf(color).slice().buffer)[0]);
  for (let i = 0; i < data.length; i++) {
    if (data[i] !== skip) pixels[i] = values[data[i]];
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Text on a rectangle of color with its lower left corner at a point, but within the canvas. */
function write(context, text, x, y, color, unit) {
  const height = 20 * unit;
  context.font = `600 ${13 * unit}px system-ui, sans-serif`;
  const width = context.measureText(text).width + 10 * unit;
  x = Math.max(0, Math.min(x, context.canvas.width - width));
  y = Math.min(Math.max(y, height), context.canvas.height);
  context.fillStyle = color;
  context.beginPath();
  context.roundRect(x, y - height, width, height, 4 * unit);
  context.fill();
  context.fillStyle = inkOn(componentsOf(color));
  context.textBaseline = 'middle';
  context.fillText(text, x + 5 * unit, y - height / 2 + 0.5 * unit);
}

/**
 * Draw a picture (an ImageBitmap) with a result as large as fits into `room` ({width, height} in CSS pixels).
 *
 * `marked` is the index of an object that stands out, or null.
 */
export function draw(canvas, bitmap, { result, view }, meta, { room, opacity, marked }) {
  const fit = Math.min(room.width / bitmap.width, room.height / bitmap.height);
  const unit = Math.min(window.devicePixelRatio || 1, 3);
  canvas.style.width = `${Math.round(bitmap.width * fit)}px`;
  canvas.style.height = `${Math.round(bitmap.height * fit)}px`;
  canvas.width = Math.round(bitmap.width * fit * unit);
  canvas.height = Math.round(bitmap.height * fit * unit);
  const context = canvas.getContext('2d');
  const scale = canvas.width / bitmap.width;
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);

  if (view.map) {
    const most = view.map.data.reduce((a, b) => Math.max(a, b), 0);
    const colors = Array.from({ length: most + 1 }, (_, label) => colorOf(label, meta.palette));
    context.globalAlpha = opacity;
    context.imageSmoothingEnabled = false;
    const only = marked === null ? view.map : { ...view.map, data: view.map.data.map((v) => (v === marked ? v : 255)) };
    context.drawImage(paint(only, colors, marked === null ? -1 : 255), 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    context.imageSmoothingEnabled = true;
  }

  const objects = result.objects ?? [];
  // From the worst to the best, so that the best lie on top.
  for (let i = objects.length - 1; i >= 0; i--) {
    const { box, label } = objects[i];
    const color = colorOf(label, meta.palette);
    const [x1, y1, x2, y2] = box.map((at) => at * scale);
    const faint = marked !== null && marked !== i;
    const region = view.regions?.[i];
    if (region && !faint) {
      context.globalAlpha = 0.5;
      const mask = paint(region, ['#000', color], 0);
      context.drawImage(mask, region.x * scale, region.y * scale, region.width * scale, region.height * scale);
    }
    context.globalAlpha = faint ? 0.25 : 1;
    // A dark line under the colored one: legible on any ground.
    for (const [style, width] of [['rgb(0 0 0 / 55%)', 4.5], [color, 2.5]]) {
      context.strokeStyle = style;
      context.lineWidth = width * unit;
      context.lineJoin = 'round';
      context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
    context.globalAlpha = 1;
  }
  for (let i = objects.length - 1; i >= 0; i--) {
    if (marked !== null && marked !== i) continue;
    const item = objects[i];
    const [x, y] = [item.box[0] * scale - 1.25 * unit, item.box[1] * scale - 2 * unit];
    write(context, `${item.class} ${item.score.toFixed(2)}`, x, y, colorOf(item.label, meta.palette), unit);
  }

  const best = result.classes?.[0];
  if (best) {
    const text = `${best.class} ${best.score.toFixed(2)}`;
    write(context, text, 8 * unit, 28 * unit, colorOf(best.label, meta.palette), unit);
  }
}
