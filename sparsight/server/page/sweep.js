// The last question again at every budget: where does the answer break?

import { APIError, stream } from "./api.js";
import { show } from "./diff.js";
import { percent } from "./format.js";

const BUDGETS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4];
const byId = (id) => document.getElementById(id);
let names = [], answers = [];

async function answer(body, signal) {
  let text = "";
  try {
    for await (const chunk of stream(body, signal)) text += chunk.choices[0]?.delta.content ?? "";
  } catch (error) {
    if (error instanceof APIError && error.status !== 0 && error.status !== 401) return null;
    throw error;
  }
  return text;
}

// Ask at all budgets and with the full cache, together.
export async function sweep(body, signal) {
  const full = { ...body, sparsight: { method: "full" } };
  const bodies = [...BUDGETS.map((budget) => ({ ...body, sparsight: { ...body.sparsight, budget } })), full];
  const found = await Promise.all(bodies.map((each) => answer(each, signal)));
  names = [...BUDGETS.map(percent), "full cache"];
  answers = found;
  const marks = names.map((name, index) => {
    const same = answers[index] === answers.at(-1), mark = document.createElement("li");
    mark.className = same ? "same" : "different";
    mark.textContent = same ? name : `${name} ≠`;
    mark.title = same ? "the full cache's answer" : "another answer";
    return mark;
  });
  byId("sweep-marks").replaceChildren(...marks);
  const slider = byId("sweep-budget");
  slider.max = names.length - 1;
  slider.value = 3;
  byId("sweep-result").hidden = false;
  choose();
}

function choose() {
  const index = Number(byId("sweep-budget").value), text = answers[index];
  byId("sweep-value").textContent = names[index];
  byId("sweep-budget").setAttribute("aria-valuetext", names[index]);
  if (text === null) byId("sweep-answer").textContent = "The server refused this budget.";
  else show(byId("sweep-answer"), text, answers.at(-1) ?? text);
}

byId("sweep-budget").addEventListener("input", choose);
