"use strict"; // The request that the fields describe, and its answer from the server.

const elements = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

const make = (tag, ...content) => {
  const element = document.createElement(tag);
  element.append(...content);
  return element;
};

/** An error whose message comes from the server. */
const serverError = (message, status) => Object.assign(new Error(message), { fromServer: true, status });

const headers = () => ({
  "Content-Type": "application/json",
  ...(elements.key.value && { Authorization: `Bearer ${elements.key.value}` }),
});

/** Yield the payloads of server-sent events, wherever the byte chunks are cut. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a final \r may be the first half of \r\n
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && data.length) yield data.splice(0).join("\n");
    }
  }
}

async function errorFrom(response) {
  if (response.status === 401) elements.access.hidden = false;
  const answer = await response.json().catch(() => null), status = `${response.status} ${response.statusText}`;
  return serverError(answer?.error?.message ?? `The server answered ${status}.`, response.status);
}

/** The request that the fields describe; without a seed if its field is empty. */
function requestFields() {
  const body = { prompt: elements.prompt.value };
  for (const input of elements.settings.querySelectorAll("[name]")) body[input.name] = input.valueAsNumber;
  if (elements.seed.value) body.seed = elements.seed.valueAsNumber;
  const plain = (line) => line.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t" })[c] ?? c);
  body.stop = elements.stop.value.split("\n").filter(Boolean).map(plain);
  return body;
}
