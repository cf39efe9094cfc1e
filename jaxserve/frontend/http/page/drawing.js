// Small drawings on canvases, in the colours that the style sheet names.

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Returns a context whose unit is a pixel of the page, over a cleared canvas; null while hidden.
export function cleared(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return null;
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// A line over time, from 0 to the largest value, filled below.
export function drawSpark(canvas, values, places) {
  const context = cleared(canvas);
  if (!context || values.length < 2) return;
  const { clientWidth: width, clientHeight: height } = canvas;
  const most = Math.max(1, ...values);
  const x = (place) => width - ((values.length - 1 - place) * width) / (places - 1);
  const y = (value) => height - 2 - ((height - 6) * value) / most;
  context.beginPath();
  values.forEach((value, place) => context.lineTo(x(place), y(value)));
  context.strokeStyle = colour("accent");
  context.lineWidth = 1.5;
  context.stroke();
  context.lineTo(width, height);
  context.lineTo(x(0), height);
  context.globalAlpha = 0.15;
  context.fillStyle = colour("accent");
  context.fill();
}

// Parts of a whole, side by side.
export function drawParts(canvas, parts) {
  const context = cleared(canvas);
  const whole = parts.reduce((sum, part) => sum + part.value, 0);
  if (!context || !whole) return;
  let left = 0;
  for (const { value, name } of parts) {
    const width = (canvas.clientWidth * value) / whole;
    context.fillStyle = colour(name);
    context.fillRect(left, 0, width, canvas.clientHeight);
    left += width;
  }
}

// The pool: one square a cell, as large as fits, coloured by what its pages are.
// `cells` has three bytes each: shares, of 255, that are used, shared and cached.
export function drawPool(canvas, cells) {
  const context = cleared(canvas);
  if (!context) return;
  const { clientWidth: width, clientHeight: height } = canvas;
  const count = cells.length / 3;
  let side = Math.floor(Math.sqrt((width * height) / count));
  while (side > 1 && Math.floor(width / side) * Math.floor(height / side) < count) side -= 1;
  side = Math.max(1, Math.min(24, side));
  const columns = Math.floor(width / side);
  const gap = side > 4 ? 1 : 0;
  const [free, used, shared, cached] = ["free", "used", "shared", "cached"].map(numbers);
  for (let cell = 0; cell < count; cell += 1) {
    const [a, b, c] = [cells[3 * cell] / 255, cells[3 * cell + 1] / 255, cells[3 * cell + 2] / 255];
    const rest = Math.max(0, 1 - a - b - c);
    const mixed = free.map((value, channel) =>
      Math.round(rest * value + a * used[channel] + b * shared[channel] + c * cached[channel]));
    context.fillStyle = `rgb(${mixed.join(" ")})`;
    context.fillRect(
      (cell % columns) * side, Math.floor(cell / columns) * side, side - gap, side - gap);
  }
}

function numbers(name) {
  const text = colour(name);
  const wide = text.length === 4 ? [...text.slice(1)].map((digit) => digit + digit)
    : text.slice(1).match(/../g);
  return wide.map((digits) => parseInt(digits, 16));
}
