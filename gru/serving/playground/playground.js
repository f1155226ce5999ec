"use strict"; // Models, buttons and keys.

let running = false;
let models = [], lastFingerprint = null; // the models served, and the fingerprint of the last response
let lastSeed = null; // of the texts on the page

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await errorFrom(response);
  models = (await response.json()).data;
  elements.compare.parentElement.hidden = models.length < 2;
  if (models.length < 2 && elements.compare.checked) {
    elements.compare.checked = false;
    arrangePanes();
  }
}

/** Show one pane, or two where versions are compared, and nothing in them. */
function arrangePanes() {
  const comparing = elements.compare.checked;
  panes[1].root.hidden = !comparing;
  elements.form.classList.toggle("comparing", comparing);
  panes.forEach((pane, i) => pane.clear(comparing ? models[i] : null));
}

/** Show the model with this fingerprint, or the default model if there is none. */
async function showModel(fingerprint) {
  const matches = (model) => fingerprint === `${model.version}-${model.digest.slice(0, 16)}`;
  try {
    if (!models.some(matches)) await loadModels();
    const model = models.find(matches) ?? models[0];
    elements.model.textContent = model ? titleOf(model) : "no model is loaded yet";
  } catch (error) {
    elements.model.textContent = error.fromServer ? error.message : "the server cannot be reached";
  }
}

/** Generate one text, or one of each of two versions, all from the same request. */
async function generate() {
  const body = { ...requestFields(), stream: true, stream_options: { include_usage: true }, logprobs: 5 };
  lastSeed = body.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  running = true;
  elements.error.textContent = "";
  elements.status.textContent = "Generating…";
  updateButtons();
  scrollTo(scrollX, 0); // where prompt, button and text are in view
  arrangePanes();
  try {
    if (elements.compare.checked) await loadModels(); // the versions may have changed
    arrangePanes();
    const ends = await Promise.all(panes.filter((pane) => !pane.root.hidden).map((pane) => pane.generate(body)));
    elements.status.textContent = [...new Set(ends)].filter(Boolean).join(" ");
  } catch (error) {
    showError(error);
  } finally {
    running = false;
    updateButtons();
  }
}

function showError(error, version) {
  const message = error.fromServer ? error.message : `The server cannot be reached: ${error.message}.`;
  elements.error.append(make("div", version ? `${version}: ` : "", message));
  elements.status.textContent = "";
  if (error.status === 401) elements.key.focus();
}

function updateButtons() {
  elements.go.textContent = running ? "Stop" : "Generate";
  elements.go.type = running ? "button" : "submit"; // Enter in a field starts generation, but never stops it
  elements.more.disabled = running || elements.compare.checked || !panes[0].codePoints.length;
  elements.clear.disabled = elements.compare.disabled = running;
}

function stopAll() {
  for (const pane of panes) pane.controller?.abort();
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
  stopAll();
});
elements.more.addEventListener("click", () => {
  if (!elements.form.reportValidity()) return;
  elements.prompt.value += panes[0].text;
  elements.prompt.scrollTop = elements.prompt.scrollHeight;
  elements.form.requestSubmit();
});
elements.clear.addEventListener("click", () => {
  arrangePanes();
  elements.prompt.value = elements.error.textContent = elements.status.textContent = "";
  lastSeed = null;
  updateButtons();
  elements.prompt.focus();
});
elements.compare.addEventListener("change", () => {
  arrangePanes();
  updateButtons();
});
elements.tint.addEventListener("change", () => elements.texts.classList.toggle("tinted", elements.tint.checked));
document.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // these keys belong to the input method
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) {
    event.preventDefault(); // otherwise it would also press the focused button
    elements.form.requestSubmit();
  } else if (event.key === "Escape") {
    elements.tip.hidden = true;
    stopAll();
  }
});

elements.key.addEventListener("change", () => {
  showModel();
  sessionStorage.setItem("api-key", elements.key.value);
});
elements.settings.addEventListener("focusin", ({ target }) => {
  elements.help.textContent = target.getAttribute("aria-description") ?? "";
});
elements.settings.open = matchMedia("(min-width: 50rem)").matches;
elements.key.value = sessionStorage.getItem("api-key") ?? "";
elements.access.hidden = !elements.key.value;
showModel();
