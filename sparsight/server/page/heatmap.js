// The picture with what the cache kept of it: patches that were dropped fade, those that stayed are marked.

const canvas = document.getElementById("canvas");
const context = canvas.getContext("2d");
const byId = (id) => document.getElementById(id);
const LONGEST = 1600;

let picture = null, kept = null, token = null, number = 0;

// Show a picture, ``{image, name}``, the ``index``-th of the conversation; what was kept of it comes with `setKept`.
export function setPicture(chosen, index) {
  picture = chosen;
  number = index;
  canvas.hidden = !picture;
  draw();
}

// What the server says was kept of a request, or null; with ``at``, what is held while that token of the answer is
// generated: its ``index`` and its ``text``.
export function setKept(found, at = null) {
  const same = found === kept;
  kept = found;
  token = at;
  byId("heat-controls").hidden = !found?.tiles.length;
  byId("legend").hidden = !found?.recalls.length;
  if (found && !same) {
    fill(byId("layer"), "all layers", found.layers.map((layer) => layer.layer));
    fill(byId("head"), "all heads", [...Array(found.layers[0]?.heads.length ?? 0).keys()]);
  }
  draw();
}

function fill(select, all, values) {
  const before = select.value;
  select.replaceChildren(new Option(all, ""), ...values.map((value) => new Option(value, value)));
  if ([...select.options].some((option) => option.value === before)) select.value = before;
}

// The newest recall before a token; the first token of an answer has none.
const recallOf = (index) => kept.recalls.findLast((recall) => recall.token <= index);

// Of each tile, which share of the KV heads shown holds each patch, and which share fetched it from the full cache.
function shares() {
  const recall = token && recallOf(token.index);
  if (recall) {
    const heads = kept.layers.reduce((sum, layer) => sum + layer.heads.length, 0);
    const share = (counts) => Float32Array.from(counts, (count) => count / heads);
    return kept.tiles.map((_, tile) => ({ held: share(recall.held[tile]), fetched: share(recall.fetched[tile]) }));
  }
  const layer = byId("layer").value, head = byId("head").value;
  const heads = kept.layers
    .filter((each) => layer === "" || String(each.layer) === layer)
    .flatMap((each) => each.heads.filter((_, index) => head === "" || String(index) === head));
  return kept.tiles.map(({ rows, columns }, tile) => {
    const counts = new Uint16Array(rows * columns);
    for (const { patches } of heads) for (const patch of patches[tile]) counts[patch]++;
    return { held: Float32Array.from(counts, (count) => count / heads.length), fetched: new Float32Array(counts.length) };
  });
}

export function draw() {
  if (!picture) return;
  const { image } = picture, scale = Math.max(1, Math.min(3, LONGEST / Math.max(image.width, image.height)));
  canvas.width = Math.round(image.width * scale);
  canvas.height = Math.round(image.height * scale);
  context.imageSmoothingEnabled = scale < 2;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const words = kept ? describe(shade()) : "";
  canvas.setAttribute("aria-label", picture.name + (words && `, ${words}`));
  byId("kept").textContent = words && `${picture.name}: ${words}`;
}

// Shade the patches of the picture; returns which share of them is held and was fetched, or null if it has none.
function shade() {
  const shown = shares(), tiles = kept.tiles.map((tile, index) => ({ ...tile, ...shown[index] })).filter((tile) => tile.image === number);
  if (!tiles.length) return null;
  if (byId("overlay").checked && tiles.every((tile) => tile.box)) paintAll(tiles);
  const sum = (name) => tiles.reduce((total, tile) => tile[name].reduce((before, share) => before + share, total), 0);
  const count = tiles.reduce((total, { rows, columns }) => total + rows * columns, 0);
  return { held: sum("held") / count, fetched: sum("fetched") / count };
}

function describe(found) {
  if (!found) return "";
  const part = (share) => `${(100 * share).toFixed(1)} %`;
  if (token && !recallOf(token.index)) return `“${token.text}” was generated from the full prompt, before it was compressed`;
  if (token) return `at “${token.text}”, ${part(found.held)} of its patches held, ${part(found.fetched)} fetched from the full cache, mean of layers and heads`;
  return `${part(found.held)} of its patches kept${byId("layer").value === "" ? ", mean of layers and heads" : ""}`;
}

// Where tiles overlap, the patch that more heads hold is shown; what no tile covers, the model does not get.
function paintAll(tiles) {
  const style = getComputedStyle(document.documentElement);
  const [ground, mark, blue] = ["--paper", "--mark", "--fetched"].map((name) => style.getPropertyValue(name));
  const across = edges(tiles, 0, "columns", canvas.width), down = edges(tiles, 1, "rows", canvas.height);
  for (let j = 1; j < down.length; j++)
    for (let i = 1; i < across.length; i++) {
      const box = [across[i - 1], down[j - 1], across[i], down[j]];
      const x = (box[0] + box[2]) / 2 / canvas.width, y = (box[1] + box[3]) / 2 / canvas.height;
      const cells = tiles.map((tile) => cellAt(tile, x, y)).filter(Boolean);
      if (!cells.length) {
        paint(box, ground, 0.97);
        continue;
      }
      const { held, fetched } = cells.reduce((most, cell) => (cell.held > most.held ? cell : most));
      const strength = held ** 0.45;
      paint(box, ground, 0.85 * (1 - strength));
      if (held) paint(box, mark, 0.42 * strength * (1 - fetched / held));
      if (fetched) paint(box, blue, (0.42 * strength * fetched) / held);
    }
}

// Where cells of some tile begin or end along an axis, in pixels.
function edges(tiles, axis, cells, length) {
  const found = new Set([0, length]);
  for (const { box, [cells]: count } of tiles)
    for (let cell = 0; cell <= count; cell++) {
      const edge = Math.round((box[axis] + ((box[axis + 2] - box[axis]) * cell) / count) * length);
      if (edge > 0 && edge < length) found.add(edge);
    }
  return [...found].sort((one, other) => one - other);
}

// What is held of the patch of a tile at a place of the picture, or null outside of the tile.
function cellAt({ box: [left, top, right, bottom], rows, columns, held, fetched }, x, y) {
  const column = Math.floor(((x - left) / (right - left)) * columns), row = Math.floor(((y - top) / (bottom - top)) * rows);
  if (column < 0 || column >= columns || row < 0 || row >= rows) return null;
  const cell = row * columns + column;
  return { held: held[cell], fetched: fetched[cell] };
}

function paint([left, top, right, bottom], color, alpha) {
  context.globalAlpha = alpha;
  context.fillStyle = color;
  context.fillRect(left, top, right - left, bottom - top);
  context.globalAlpha = 1;
}

// The same picture on another canvas.
export function copyTo(other) {
  other.width = canvas.width;
  other.height = canvas.height;
  other.getContext("2d").drawImage(canvas, 0, 0);
}

export const toBlob = () => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

for (const id of ["layer", "head", "overlay"]) byId(id).addEventListener("change", draw);
