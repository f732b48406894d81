// The picture with what the cache kept of it: patches that were dropped fade, those that stayed are marked.

const canvas = document.getElementById("canvas");
const context = canvas.getContext("2d");
const byId = (id) => document.getElementById(id);
const LONGEST = 1600;

let picture = null, kept = null, number = 0;

// Show a picture, ``{image, name}``, the ``index``-th of the conversation; what was kept of it comes with `setKept`.
export function setPicture(chosen, index) {
  picture = chosen;
  number = index;
  canvas.hidden = !picture;
  draw();
}

// What the server says was kept of a request, or null.
export function setKept(found) {
  kept = found;
  byId("heat-controls").hidden = !found?.tiles.length;
  if (found) {
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

// The KV heads that are shown, each as a list of sets of patches, a set for each tile.
function shown() {
  const layer = byId("layer").value, head = byId("head").value;
  return kept.layers
    .filter((each) => layer === "" || String(each.layer) === layer)
    .flatMap((each) => each.heads.filter((_, index) => head === "" || String(index) === head))
    .map((each) => each.patches.map((patches) => new Set(patches)));
}

export function draw() {
  if (!picture) return;
  const { image } = picture, scale = Math.max(1, Math.min(3, LONGEST / Math.max(image.width, image.height)));
  canvas.width = Math.round(image.width * scale);
  canvas.height = Math.round(image.height * scale);
  context.imageSmoothingEnabled = scale < 2;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const share = kept ? shade() : null;
  const words = share === null ? "" : `${(100 * share).toFixed(1)} % of its patches kept`;
  canvas.setAttribute("aria-label", picture.name + (words && `, ${words}`));
  const mean = byId("layer").value === "" ? ", mean of layers and heads" : "";
  byId("kept").textContent = words && `${picture.name}: ${words}${mean}`;
}

// Shade the patches of the picture; returns the share that was kept, or null if it has no patches.
function shade() {
  const heads = shown(), style = getComputedStyle(document.documentElement);
  const ground = style.getPropertyValue("--paper"), mark = style.getPropertyValue("--mark");
  let sum = 0, count = 0;
  kept.tiles.forEach((tile, index) => {
    if (tile.image !== number) return;
    const outside = tile.box ?? [0, 0, 1, 1], cells = tile.rows * tile.columns;
    for (let cell = 0; cell < cells; cell++) {
      const share = heads.filter((head) => head[index].has(cell)).length / heads.length;
      sum += share;
      count++;
      if (byId("overlay").checked && tile.box) {
        const box = place(outside, tile, cell);
        paint(box, ground, 0.85 * (1 - share ** 0.45));
        paint(box, mark, 0.42 * share ** 0.45);
      }
    }
    // What the model does not get of the picture.
    const [left, top, right, bottom] = outside;
    for (const part of [[0, 0, left, 1], [right, 0, 1, 1], [left, 0, right, top], [left, bottom, right, 1]])
      if (byId("overlay").checked) paint(pixels(part), ground, 0.97);
  });
  return count ? sum / count : null;
}

function place([left, top, right, bottom], { rows, columns }, cell) {
  const width = (right - left) / columns, height = (bottom - top) / rows;
  const x = left + (cell % columns) * width, y = top + Math.floor(cell / columns) * height;
  return pixels([x, y, x + width, y + height]);
}

const pixels = (box) => box.map((side, index) => Math.round(side * (index % 2 ? canvas.height : canvas.width)));

function paint([left, top, right, bottom], color, alpha) {
  context.globalAlpha = alpha;
  context.fillStyle = color;
  context.fillRect(left, top, right - left, bottom - top);
  context.globalAlpha = 1;
}

export const toBlob = () => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

for (const id of ["layer", "head", "overlay"]) byId(id).addEventListener("change", draw);
