// What the server is doing, from its metrics.

import { gauges, text } from "./api.js";
import { bytes } from "./format.js";

const byId = (id) => document.getElementById(id);
const PERIOD = 1000;

async function update() {
  let values;
  try {
    values = gauges(await text("metrics"));
  } catch {
    for (const id of ["running", "waiting", "held", "full"]) byId(id).textContent = "–";
    return;
  }
  const value = (name) => values[`sparsight:${name}`] ?? 0;
  byId("running").textContent = value("num_requests_running");
  byId("waiting").textContent = value("num_requests_waiting");
  const held = value("kv_bytes"), full = value("full_kv_bytes");
  byId("held").textContent = bytes(held);
  byId("full").textContent = bytes(full);
  const most = Math.max(held, full, 1);
  byId("held-bar").style.width = `${(100 * held) / most}%`;
  byId("full-bar").style.width = `${(100 * full) / most}%`;
}

// Nothing is asked while the page is not looked at.
export function watch() {
  setInterval(() => document.hidden || update(), PERIOD);
  update();
}
