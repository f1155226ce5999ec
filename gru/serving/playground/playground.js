const elements = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const FINISH_REASONS = { stop: "the document ended or a stop string was generated", length: "max tokens reached" };
const SYMBOLS = { " ": "␣", "\n": "↵", "\t": "⇥" };

/** An error whose message comes from the server. */
const serverError = (message, status) => Object.assign(new Error(message), { fromServer: true, status });

let running = null; // the AbortController of the request in progress
let models = [], lastFingerprint = null; // the models served, and the fingerprint of the last response
let codePoints = []; // the text; text_offset counts code points
let pieces = []; // {offset, tokens, span}: each covers the text up to the next piece's offset, in ascending order
let drawn = 0; // number of pieces that have a span
let base = null; // text_offset at the beginning of the text, since a server may count the prompt

// --- talking to the server ---

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

/** Show the model with this fingerprint, or the default model if there is none. */
async function showModel(fingerprint) {
  const matches = (model) => fingerprint === `${model.version}-${model.digest.slice(0, 16)}`;
  try {
    if (!models.some(matches)) {
      const response = await fetch("v1/models", { headers: headers() });
      if (!response.ok) throw await errorFrom(response);
      models = (await response.json()).data;
    }
    const model = models.find(matches) ?? models[0];
    const score = model?.bits_per_byte == null ? "" : `, ${model.bits_per_byte.toFixed(3)} bits per byte`;
    elements.model.textContent = model ? `${model.id}, version ${model.version}${score}` : "no model is loaded yet";
  } catch (error) {
    elements.model.textContent = error.fromServer ? error.message : "the server cannot be reached";
  }
}

/** The request that the fields describe. */
function requestBody() {
  const body = { prompt: elements.prompt.value, stream: true, stream_options: { include_usage: true }, logprobs: 5 };
  for (const input of elements.settings.querySelectorAll("[name]")) body[input.name] = input.valueAsNumber;
  body.seed = elements.seed.value ? elements.seed.valueAsNumber : crypto.getRandomValues(new Uint32Array(1))[0];
  const plain = (line) => line.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t" })[c] ?? c);
  body.stop = elements.stop.value.split("\n").filter(Boolean).map(plain);
  return body;
}

async function generate() {
  const body = requestBody(), controller = new AbortController(), start = performance.now();
  let answered = false, finish = null, tokens = null, first = null, last = null;
  const measure = () => {
    elements.tokens.textContent = tokens ?? "–";
    elements.first.textContent = first === null ? "–" : `${((first - start) / 1000).toFixed(2)} s`;
    elements.rate.textContent = tokens > 1 && last > first ? ((tokens - 1) / (last - first) * 1000).toFixed(1) : "–";
    elements.finish.textContent = finish ?? "–";
    elements.used.textContent = body.seed;
  };
  running = controller;
  clearText();
  elements.status.textContent = "Generating…";
  updateButtons();
  measure();
  elements.text.scrollIntoView({ block: "nearest" });
  try {
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: controller.signal,
    });
    answered = true;
    if (!response.ok) throw await errorFrom(response);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw serverError(chunk.error.message);
      if (chunk.system_fingerprint !== lastFingerprint) showModel(lastFingerprint = chunk.system_fingerprint);
      for (const choice of chunk.choices) {
        if (choice.text) first ??= performance.now();
        last = performance.now();
        if (choice.logprobs?.tokens) tokens += choice.logprobs.tokens.length;
        finish = choice.finish_reason ?? finish;
        show(choice);
      }
      tokens = chunk.usage?.completion_tokens ?? tokens;
      measure();
    }
    if (!finish) throw new Error("it ended before the text did");
    elements.status.textContent = `Finished: ${FINISH_REASONS[finish] ?? finish}.`;
  } catch (error) {
    finish = controller.signal.aborted ? "stopped" : "error";
    elements.status.textContent = controller.signal.aborted ? "Stopped." : "";
    if (!controller.signal.aborted) elements.error.textContent =
      error.fromServer ? error.message
      : answered ? `The stream broke off: ${error.message}. The text so far is kept.`
      : `The server cannot be reached: ${error.message}.`;
    if (error.status === 401) elements.key.focus();
  } finally {
    controller.abort(); // closes a response that was not read to its end
    running = null;
    measure();
    updateButtons();
  }
}

// --- the text ---

function clearText() {
  [codePoints, pieces, drawn, base] = [[], [], 0, null];
  elements.text.replaceChildren();
  elements.tip.hidden = true;
  elements.error.textContent = elements.status.textContent = "";
}

/** Whether a chunk's token lists have one length and offsets in ascending order. */
function isConsistent(logprobs) {
  const { tokens, token_logprobs: values, text_offset: offsets } = logprobs ?? {};
  return [tokens, values, offsets].every(Array.isArray) && tokens.length === values.length
    && tokens.length === offsets.length && offsets.every((offset, i) => Number.isInteger(offset)
    && offset >= (i ? offsets[i - 1] : base === null ? offset : base + (pieces.at(-1)?.offset ?? 0)));
}

/** Add a chunk. `text` is the text; the tokens, which may be ahead of it, only determine where spans begin. */
function show({ text, logprobs }) {
  const begin = codePoints.length, atEnd = innerHeight + scrollY > document.documentElement.scrollHeight - 40;
  for (const codePoint of text) codePoints.push(codePoint);
  if (isConsistent(logprobs) && (pieces.length || logprobs.tokens.length)) {
    logprobs.tokens.forEach((name, i) => {
      base ??= logprobs.text_offset[i] - begin;
      const offset = logprobs.text_offset[i] - base;
      const token = { name, logprob: logprobs.token_logprobs[i], top: logprobs.top_logprobs?.[i] ?? {} };
      if (pieces.at(-1)?.offset === offset) pieces.at(-1).tokens.push(token); // several tokens of one character
      else pieces.push({ offset, tokens: [token] });
    });
  } else if (text && (logprobs || base === null)) { // otherwise it is held-back text of tokens that came earlier
    while (pieces.at(-1)?.offset >= begin) pieces.pop();
    pieces.push({ offset: begin, tokens: [] });
  }
  for (let i = Math.max(0, drawn - 1); i < pieces.length && pieces[i].offset < codePoints.length; i++) draw(i);
  if (atEnd) scrollTo(scrollX, document.documentElement.scrollHeight);
}

function draw(i) {
  const piece = pieces[i];
  if (!piece.span) {
    piece.span = document.createElement("span");
    piece.span.tabIndex = i ? -1 : 0;
    elements.text.append(piece.span);
    drawn = i + 1;
  }
  piece.span.textContent = codePoints.slice(piece.offset, pieces[i + 1]?.offset).join("");
  const bits = -totalLogprob(piece) / Math.LN2; // information content, on which 1 % and 10 % differ visibly
  piece.span.style.setProperty("--surprise", Math.min(1, bits / 10));
}

/** The log-probability of a piece's tokens together; null if unknown. */
function totalLogprob({ tokens }) {
  const isKnown = tokens.length && tokens.every((token) => token.logprob !== null);
  return isKnown ? tokens.reduce((sum, token) => sum + token.logprob, 0) : null;
}

// --- a token's probability, under the pointer or the focus ---

const visible = (text) => [...text].map((c) => SYMBOLS[c] ?? (c < " " ? JSON.stringify(c).slice(1, -1) : c)).join("");
const percent = (logprob) => {
  const value = Math.exp(logprob) * 100;
  return logprob === null ? "unknown" : value > 0 && value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
};
const make = (tag, ...content) => {
  const element = document.createElement(tag);
  element.append(...content);
  return element;
};

function showTip(span) {
  shown = span;
  const piece = pieces.find((other) => other.span === span);
  elements.tip.hidden = !piece?.tokens.length;
  if (elements.tip.hidden) return;
  const line = (text, logprob) => [make("bdi", visible(text)), `: ${percent(logprob)}`];
  const tables = piece.tokens.map(({ name, logprob, top }) => make(
    "table",
    make("caption", ...line(name, logprob)),
    ...Object.entries(top).sort((one, other) => other[1] - one[1]).map(([alternative, value]) => {
      const row = make("tr", make("th", make("bdi", visible(alternative))), make("td", percent(value)));
      row.style.setProperty("--p", Math.exp(value));
      row.classList.toggle("chosen", alternative === name);
      return row;
    }),
  ));
  elements.tip.replaceChildren(make("div", ...tables));
  if (tables.length > 1) {
    elements.tip.prepend(make("p", ...line(span.textContent, totalLogprob(piece)), `, in ${tables.length} tokens`));
  }
  placeTip(span);
}

/** Place the tip above the span, or below if there is not enough room. */
function placeTip(span) {
  const { left, top, bottom } = firstRect(span), { clientWidth, clientHeight } = document.documentElement;
  elements.tip.style.left = 0; // where it can have its full width
  elements.tip.style.maxHeight = `${Math.max(top, clientHeight - bottom)}px`;
  const { offsetWidth: width, offsetHeight: height } = elements.tip;
  elements.tip.style.left = `${Math.max(8, Math.min(left, clientWidth - width - 8))}px`;
  elements.tip.style.top = `${top >= height ? top - height : bottom}px`;
}

const firstRect = (span) => span.getClientRects()[0] ?? span.getBoundingClientRect();

let hideTimer = 0, shown = null;
const keepTip = () => clearTimeout(hideTimer);
const hideTipSoon = () => { // not at once: the pointer may be on its way to the tip
  keepTip();
  const focused = () => (elements.text.contains(document.activeElement) ? document.activeElement : null);
  hideTimer = setTimeout(() => showTip(focused()), 150);
};
elements.text.addEventListener("pointerover", ({ target }) => {
  if (target === elements.text) return hideTipSoon();
  keepTip();
  showTip(target);
});
elements.text.addEventListener("pointerleave", hideTipSoon);
addEventListener("scroll", () => elements.tip.hidden || placeTip(shown));
elements.tip.addEventListener("pointerenter", keepTip);
elements.tip.addEventListener("pointerleave", hideTipSoon);
elements.text.addEventListener("focusin", ({ target }) => {
  elements.text.querySelectorAll("[tabindex='0']").forEach((span) => { span.tabIndex = -1; });
  target.tabIndex = 0;
  target.setAttribute("aria-describedby", "tip");
  showTip(target);
});
elements.text.addEventListener("focusout", ({ target }) => {
  target.removeAttribute("aria-describedby");
  elements.tip.hidden = true;
});

/** The nearest span on the next line, or on the previous one. */
function onAdjacentLine(span, sibling) {
  const from = firstRect(span);
  let best = null;
  for (let other = span[sibling]; other; other = other[sibling]) {
    const place = firstRect(other);
    if (Math.abs(place.top - from.top) < 2) continue;
    if (best && Math.abs(place.top - firstRect(best).top) > 2) break;
    if (!best || Math.abs(place.left - from.left) < Math.abs(firstRect(best).left - from.left)) best = other;
  }
  return best;
}

elements.text.addEventListener("keydown", (event) => {
  const span = event.target, [before, after] = ["previousElementSibling", "nextElementSibling"];
  const [left, right] = getComputedStyle(elements.text).direction === "ltr" ? [before, after] : [after, before];
  const moves = {
    ArrowLeft: () => span[left], ArrowUp: () => onAdjacentLine(span, before),
    ArrowRight: () => span[right], ArrowDown: () => onAdjacentLine(span, after),
    Home: () => elements.text.firstElementChild, End: () => elements.text.lastElementChild,
  };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  moves[event.key]()?.focus();
});

// --- buttons and keys ---

function updateButtons() {
  elements.go.textContent = running ? "Stop" : "Generate";
  elements.go.type = running ? "button" : "submit"; // Enter in a field starts generation, but never stops it
  elements.more.disabled = Boolean(running) || !codePoints.length;
  elements.clear.disabled = Boolean(running);
  elements.text.classList.toggle("running", Boolean(running));
  elements.text.setAttribute("aria-busy", Boolean(running));
}

elements.form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) generate();
});
// The browser can only show the invalid field if the settings are open.
elements.form.addEventListener("invalid", () => { elements.settings.open = true; }, true);
elements.go.addEventListener("click", (event) => {
  if (!running) return;
  event.preventDefault(); // by the time of the submit the button may be Generate again
  running.abort();
});
elements.more.addEventListener("click", () => {
  if (!elements.form.reportValidity()) return;
  elements.prompt.value += codePoints.join("");
  elements.prompt.scrollTop = elements.prompt.scrollHeight;
  elements.form.requestSubmit();
});
elements.copy.addEventListener("click", () => {
  const all = make("textarea"); // navigator.clipboard exists only over https and on localhost
  all.value = elements.prompt.value + codePoints.join("");
  elements.copy.after(all);
  all.select();
  elements.status.textContent = document.execCommand("copy") ? "Copied." : "The browser does not allow copying.";
  all.remove();
  elements.copy.focus();
});
elements.clear.addEventListener("click", () => {
  clearText();
  elements.prompt.value = "";
  for (const figure of document.querySelectorAll("dd")) figure.textContent = "–";
  updateButtons();
  elements.prompt.focus();
});
elements.tint.addEventListener("change", () => elements.text.classList.toggle("tinted", elements.tint.checked));
document.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // these keys belong to the input method
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) {
    event.preventDefault(); // otherwise it would also press the focused button
    elements.form.requestSubmit();
  } else if (event.key === "Escape") {
    elements.tip.hidden = true;
    running?.abort();
  }
});

elements.key.addEventListener("change", () => {
  showModel();
  sessionStorage.setItem("api-key", elements.key.value);
});
elements.settings.open = matchMedia("(min-width: 50rem)").matches;
elements.key.value = sessionStorage.getItem("api-key") ?? "";
elements.access.hidden = !elements.key.value;
showModel();
