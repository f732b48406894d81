// Calls of the server's public API.

export class APIError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const KEY = "sparsight-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function request(path, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }) };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new APIError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new APIError(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}

export const json = async (path) => (await request(path)).json();
export const text = async (path) => (await request(path)).text();

// The chunks of a streamed chat completion.
export async function* stream(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify({ ...body, ...options }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new APIError(0, "The connection to the server was lost.");
    }
    if (part.done) throw new APIError(0, "The connection to the server was lost.");
    buffer += part.value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (!event.startsWith("data: ")) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new APIError(500, chunk.error.message);
      yield chunk;
    }
  }
}

// Values of a Prometheus text by name, summed over labels.
export function gauges(text) {
  const values = {};
  for (const line of text.split("\n")) {
    const found = /^([\w:]+)(?:\{.*\})? (\S+)/.exec(line);
    if (found) values[found[1]] = (values[found[1]] ?? 0) + Number(found[2]);
  }
  return values;
}
