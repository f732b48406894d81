// The page: pictures, settings and the conversation, over the server's public API.

import { APIError, json, key } from "./api.js";
import { Answer } from "./answer.js";
import { show } from "./diff.js";
import { percent } from "./format.js";
import { draw, setKept, setPicture, toBlob } from "./heatmap.js";
import { watch } from "./machine.js";
import { sweep } from "./sweep.js";
import { follow } from "./tokens.js";

const byId = (id) => document.getElementById(id);
let model = "", methods = [], pictures = [], selected = 0, turns = [], running = null;

// Settings, which the address carries after its "#".

function settings() {
  return { method: byId("method").value, budget: byId("budget").value / 100, length: Number(byId("length").value), compare: byId("compare").checked };
}

function restore() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (methods.some((each) => each.name === given.get("method"))) byId("method").value = given.get("method");
  const numbers = { budget: Number(given.get("budget")) * 100, length: Number(given.get("length")) };
  for (const [id, value] of Object.entries(numbers)) if (value > 0) byId(id).value = value;
  if (given.has("compare")) byId("compare").checked = given.get("compare") === "true";
}

function showSettings() {
  const { method, budget } = settings(), chosen = methods.find((each) => each.name === method);
  byId("method-help").textContent = chosen?.description ?? "";
  byId("budget").disabled = chosen?.budget === null;
  byId("budget-value").textContent = chosen?.budget === null ? "everything" : percent(budget);
  byId("budget").setAttribute("aria-valuetext", byId("budget-value").textContent);
}

async function share() {
  location.hash = new URLSearchParams(settings());
  await navigator.clipboard?.writeText(location.href).catch(() => {});
  byId("share").textContent = "Link copied";
  setTimeout(() => (byId("share").textContent = "Copy link"), 2000);
}

// Pictures

const dataURL = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });

function fileOf(url, name) {
  const [head, data] = url.split(",");
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return new File([bytes], name, { type: head.slice(5).split(";")[0] });
}

async function add(files) {
  // What is sent belongs to the first question, so a conversation has its pictures from the start.
  if (turns.length) clear();
  for (const file of files) {
    try {
      const image = await createImageBitmap(file);
      pictures.push({ name: file.name, image, url: await dataURL(file) });
      notice("");
    } catch {
      notice(`${file.name} is not a picture that this browser can show.`);
    }
  }
  select(Math.max(0, pictures.length - 1));
}

function select(index) {
  selected = index;
  setPicture(pictures[index] ?? null, index);
  const buttons = pictures.map((picture, number) => {
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-pressed", String(number === index));
    image.src = picture.url;
    image.alt = picture.name;
    button.append(image);
    button.addEventListener("click", () => select(number));
    return button;
  });
  byId("thumbnails").replaceChildren(...(pictures.length > 1 ? buttons : []));
  enable();
}

async function showExamples() {
  const examples = await json("v1/sparsight/examples");
  const buttons = examples.map(({ image, question }, index) => {
    const button = document.createElement("button"), picture = document.createElement("img");
    button.type = "button";
    picture.src = image;
    picture.alt = `Example ${index + 1}: ${question}`;
    button.append(picture);
    button.addEventListener("click", async () => {
      clear();
      await add([fileOf(image, `example ${index + 1}`)]);
      byId("question").value = question;
      byId("question").focus();
    });
    return button;
  });
  byId("example-list").replaceChildren(...buttons);
  byId("examples").hidden = !buttons.length;
}

// The conversation

function messages(question) {
  const history = turns.flatMap((turn) => [
    { role: "user", content: turn.content },
    { role: "assistant", content: turn.answers[0].text },
  ]);
  const images = turns.length ? [] : pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
  const content = [...images, { type: "text", text: question }];
  return { content, messages: [...history, { role: "user", content }] };
}

function chosenRecipe() {
  const { method, budget } = settings(), chosen = methods.find((each) => each.name === method);
  return chosen.budget === null ? { method } : { method, budget };
}

async function ask(question) {
  const { content, messages: sent } = messages(question), recipe = chosenRecipe(), { length, compare } = settings();
  const body = { model, messages: sent, max_tokens: length, temperature: 0 };
  const recipes = compare && recipe.budget ? [recipe, { method: "full" }] : [recipe];
  const answers = recipes.map((sparsight) => new Answer({ ...body, sparsight }));
  const turn = { question, content, answers, body: answers[0].body };
  const element = document.createElement("article"), asked = document.createElement("p"), both = document.createElement("div");
  element.className = "turn";
  asked.textContent = question;
  both.className = "answers";
  both.append(...answers.map((answer) => answer.element));
  element.append(asked, both);
  byId("turns").append(element);
  byId("sweep-result").hidden = true;
  await work(async (signal) => {
    element.scrollIntoView({ block: "nearest" });
    const results = await Promise.allSettled(answers.map((answer) => answer.run(signal)));
    if (answers[0].complete) {
      turns.push(turn);
      byId("question").value = "";
      if (answers[1]?.complete) show(answers[0].content, answers[0].text, answers[1].text);
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: "what was kept" });
      button.addEventListener("click", () => showKept(answers[0]));
      answers[0].title.append(button);
    }
    for (const result of results) if (result.status === "rejected") throw result.reason;
    if (answers[0].complete) await showKept(answers[0]);
  });
}

async function showKept(answer) {
  try {
    if (!answer.showKept) {
      const kept = await json(`v1/sparsight/kept/${encodeURIComponent(answer.id)}`);
      const show = (token) => setKept(kept, token);
      answer.showKept = kept.recalls.length ? follow(answer, kept.token_characters, show) : show;
    }
    answer.showKept();
  } catch (error) {
    setKept(null);
    if (error.status !== 404) throw error;
    notice("The server has forgotten what was kept for this answer.");
  }
}

// Run something that can be stopped, and say what went wrong.
async function work(task) {
  running = new AbortController();
  notice("");
  enable();
  try {
    await task(running.signal);
  } catch (error) {
    if (error.name !== "AbortError") report(error);
  } finally {
    running = null;
    enable();
  }
}

function report(error) {
  if (error instanceof APIError && error.status === 401) askKey("The server does not know this key.");
  else notice(error.message);
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function clear() {
  running?.abort();
  turns = [];
  pictures = [];
  byId("turns").replaceChildren();
  byId("sweep-result").hidden = true;
  setKept(null);
  select(0);
}

function enable() {
  byId("ask").disabled = Boolean(running) || !model;
  byId("stop").disabled = !running;
  byId("sweep").disabled = Boolean(running) || !turns.at(-1)?.body.sparsight.budget;
  byId("clear").disabled = !turns.length && !pictures.length;
  byId("export").disabled = !turns.length;
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function exportConversation() {
  const found = turns.map(({ question, answers }) => ({
    question,
    answers: answers.map(({ text, finish, usage }) => ({ text, finish_reason: finish, cache: usage })),
  }));
  const whole = { model, pictures: pictures.map(({ name, url }) => ({ name, url })), turns: found };
  save(new Blob([JSON.stringify(whole, null, 2)], { type: "application/json" }), "conversation.json");
}

// Start

function askKey(text) {
  byId("key-text").textContent = text;
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  draw();
}

async function start() {
  try {
    const [models, found] = await Promise.all([json("v1/models"), json("v1/sparsight/methods")]);
    model = models.data[0].id;
    methods = found.methods;
    byId("model").textContent = model;
    byId("method").replaceChildren(...methods.map((each) => new Option(each.name, each.name)));
    byId("method").value = found.default;
    byId("budget").value = 100 * (methods.find((each) => each.name === found.default)?.budget ?? 0.1);
    restore();
    showSettings();
    notice("");
    await showExamples();
  } catch (error) {
    if (error.status === 401) askKey(key.get() ? "The server does not know this key." : "The server asks for a key. It stays in this tab.");
    else report(error);
  }
  enable();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (question && !byId("ask").disabled) ask(question);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
byId("stop").addEventListener("click", () => running?.abort());
byId("sweep").addEventListener("click", () => work((signal) => sweep(turns.at(-1).body, signal)));
byId("clear").addEventListener("click", clear);
byId("share").addEventListener("click", share);
byId("export").addEventListener("click", exportConversation);
byId("save-picture").addEventListener("click", async () => save(await toBlob(), "kept.png"));
byId("key-button").addEventListener("click", () => askKey("The key of this server. It stays in this tab."));
byId("key-dialog").addEventListener("close", () => {
  if (byId("key-dialog").returnValue !== "ok") return;
  key.set(byId("key").value);
  start();
});
byId("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
for (const id of ["method", "budget"]) byId(id).addEventListener("input", showSettings);
byId("file").addEventListener("change", async (event) => {
  await add(event.target.files);
  event.target.value = "";
});
const drop = byId("drop");
for (const [kind, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", over);
    if (kind === "drop") add(event.dataTransfer.files);
  });

theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
start();
watch();
