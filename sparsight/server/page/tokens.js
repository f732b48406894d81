// The tokens of an answer: the pointer over its text, or a slider below it, chooses one.

import { copyTo } from "./heatmap.js";

// Take the tokens of a complete answer, of so many characters each, and call ``show`` with the ``index`` and the
// ``text`` of the one that is chosen, or with null. Returns what chooses none.
export function follow(answer, lengths, show) {
  const letters = Array.from(answer.text), spans = [], texts = [];
  for (const length of lengths) texts.push(letters.splice(0, length).join(""));
  wrap(answer.content, texts, spans);
  const label = document.createElement("label"), slider = document.createElement("input"), name = document.createElement("p");
  Object.assign(slider, { type: "range", min: 0, max: texts.length, step: 1, value: 0 });
  name.className = "numbers";
  label.append("What is held at each token", slider);
  // On a phone the picture is out of sight.
  const picture = document.createElement("canvas");
  picture.setAttribute("aria-hidden", "true");
  answer.content.after(label, name, picture);

  let current = null;
  function choose(index) {
    current = index;
    spans.forEach((span, number) => span?.classList.toggle("current", number === index));
    const text = texts[index]?.trim() || (texts[index] ? "white space" : "no text");
    name.textContent = index < 0 ? "the end of the prompt" : `token ${index + 1} of ${texts.length}: ${text}`;
    show(index < 0 ? null : { index, text });
    copyTo(picture);
  }
  const chosen = () => Number(slider.value) - 1;
  const under = (event) => spans.indexOf(event.target.closest(".token"));
  const move = (value) => {
    slider.value = value;
    choose(chosen());
    slider.setAttribute("aria-valuetext", name.textContent);
  };
  slider.addEventListener("input", () => move(slider.value));
  // Not when the page moves under a pointer at rest.
  answer.content.addEventListener("pointermove", (event) => ![-1, current].includes(under(event)) && choose(under(event)));
  answer.content.addEventListener("pointerleave", () => choose(chosen()));
  answer.content.addEventListener("click", (event) => move(under(event) + 1));
  return () => move(0);
}

// Put each token of an element's text into a span, with the marks that are in it; one without text has no span.
function wrap(element, texts, spans) {
  const parts = [...element.childNodes].map((node) => ({ text: node.textContent, marked: node.nodeName === "MARK" }));
  element.replaceChildren();
  for (const text of texts) {
    const span = text && Object.assign(document.createElement("span"), { className: "token" });
    spans.push(span || null);
    for (let rest = text.length; rest > 0; ) {
      const [part] = parts, piece = part.text.slice(0, rest);
      span.append(part.marked ? Object.assign(document.createElement("mark"), { textContent: piece }) : piece);
      part.text = part.text.slice(piece.length);
      rest -= piece.length;
      if (!part.text) parts.shift();
    }
    if (span) element.append(span);
  }
}
