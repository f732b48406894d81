// One answer: a stream of text with its times and what the cache held.

import { APIError, stream } from "./api.js";
import { bytes, percent, seconds } from "./format.js";

const part = (tag, name, text = "") => Object.assign(document.createElement(tag), { className: name, textContent: text });

export class Answer {
  constructor(body) {
    const { method, budget } = body.sparsight, full = budget === undefined;
    this.body = body;
    this.text = "";
    this.element = part("section", full ? "answer full" : "answer");
    this.title = part("h3", "");
    this.title.append(part("span", "", full ? "full cache" : `${method} at ${percent(budget)}`));
    this.content = part("p", "answer-text");
    this.bar = part("span", full ? "full" : "");
    const bar = part("span", "bar");
    bar.append(this.bar);
    this.numbers = part("p", "numbers", "waiting");
    this.element.append(this.title, this.content, bar, this.numbers);
  }

  // Read the stream to its end; what failed is shown, and thrown again where it concerns the page.
  async run(signal) {
    const start = performance.now();
    let first = null, tokens = 0;
    try {
      for await (const chunk of stream(this.body, signal)) {
        this.id = chunk.id;
        const choice = chunk.choices[0];
        if (choice?.delta.content) {
          first ??= performance.now();
          this.text += choice.delta.content;
          this.content.textContent = this.text;
          this.numbers.textContent = `first text after ${seconds((first - start) / 1000)}`;
        }
        if (choice?.finish_reason) this.finish = choice.finish_reason;
        if (chunk.usage?.sparsight) {
          this.usage = chunk.usage.sparsight;
          tokens = chunk.usage.completion_tokens;
        }
      }
      this.finished(start, first ?? performance.now(), performance.now(), tokens);
    } catch (error) {
      if (error.name === "AbortError") {
        this.numbers.textContent = "stopped";
        return;
      }
      this.numbers.textContent = error.message;
      this.numbers.classList.add("error");
      if (error instanceof APIError && (error.status === 401 || error.status === 0)) throw error;
      if (!(error instanceof APIError)) throw error;
    }
  }

  finished(start, first, end, tokens) {
    this.numbers.textContent = `first text after ${seconds((first - start) / 1000)}`;
    if (tokens > 2) this.numbers.textContent += `, ${Math.round((tokens - 1) / ((end - first) / 1000))} tokens a second`;
    if (this.finish === "length") this.numbers.textContent += ", cut off at the longest answer";
    if (this.usage) {
      const share = this.usage.kv_bytes / this.usage.full_kv_bytes;
      this.bar.style.width = `${100 * Math.min(1, share)}%`;
      this.numbers.textContent += `; KV cache of the prompt ${bytes(this.usage.kv_bytes)}`;
    }
    this.complete = true;
  }
}
