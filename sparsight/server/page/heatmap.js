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
  byId("drop-text").hidden = Boolean(picture);
  draw();
}

// What the server says was kept of a request, or null.
export function setKept(found) {
  kept = found;
  byId("heat-controls").hidden = !found?.images.length;
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

// The heads that are shown, each a function from a patch's number to whether it was kept.
function shown() {
  const layer = byId("layer").value, head = byId("head").value;
  return kept.layers
    .filter((each) => layer === "" || String(each.layer) === layer)
    .flatMap((each) => each.heads.filter((_, index) => head === "" || String(index) === head))
    .map((patches) => new Set(patches));
}

export function draw() {
  if (!picture) return;
  const { image } = picture, scale = Math.min(3, LONGEST / Math.max(image.width, image.height));
  canvas.width = Math.round(image.width * Math.max(1, scale));
  canvas.height = Math.round(image.height * Math.max(1, scale));
  context.imageSmoothingEnabled = scale < 2;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const tiles = kept?.images[number]?.tiles ?? [];
  let sum = 0, count = 0;
  if (byId("overlay").checked && tiles.length) {
    const heads = shown();
    const style = getComputedStyle(document.documentElement), ground = style.getPropertyValue("--paper"), mark = style.getPropertyValue("--mark");
    for (const tile of tiles) {
      const [left, top, right, bottom] = tile.box, width = (right - left) / tile.columns, height = (bottom - top) / tile.rows;
      for (let cell = 0; cell < tile.rows * tile.columns; cell++) {
        const patch = tile.first + cell, share = heads.filter((head) => head.has(patch)).length / heads.length;
        const x = left + (cell % tile.columns) * width, y = top + Math.floor(cell / tile.columns) * height;
        const box = [x, y, x + width, y + height].map((side, index) => Math.round(side * (index % 2 ? canvas.height : canvas.width)));
        paint(box, ground, 0.88 * (1 - share ** 0.6));
        paint(box, mark, 0.42 * share ** 0.6);
        sum += share;
        count++;
      }
    }
  }
  const words = count ? `${((100 * sum) / count).toFixed(1)} % of its patches kept` : "";
  canvas.setAttribute("aria-label", `${picture.name}${words && `, ${words}`}`);
  byId("kept").textContent = words && `${picture.name}: ${words}${byId("layer").value === "" ? ", mean of layers and heads" : ""}`;
}

function paint([left, top, right, bottom], color, alpha) {
  context.globalAlpha = alpha;
  context.fillStyle = color;
  context.fillRect(left, top, right - left, bottom - top);
  context.globalAlpha = 1;
}

export const toBlob = () => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

for (const id of ["layer", "head", "overlay"]) byId(id).addEventListener("change", draw);
