"use strict"; // The text and the request, for the clipboard.

function copy(text, button) {
  const all = make("textarea"); // navigator.clipboard exists only over https and on localhost
  all.value = text;
  all.className = "copied";
  button.after(all);
  all.select();
  elements.status.textContent = document.execCommand("copy") ? "Copied." : "The browser does not allow copying.";
  all.remove();
  button.focus();
}

/** The request of the fields for other clients: with the seed of the text on the page, without what is the default. */
function copiedFields() {
  const defaults = { top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 };
  const fields = Object.entries({ model: models[0]?.id, ...requestFields() })
    .filter(([name, value]) => !Number.isNaN(value) && (value !== defaults[name] && value?.length !== 0 || name === "prompt"));
  return { ...Object.fromEntries(fields), seed: requestFields().seed ?? lastSeed ?? undefined };
}

function asCurl() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  return [
    `curl ${quoted(new URL("v1/completions", location).href)}`,
    "-H 'Content-Type: application/json'",
    ...(elements.key.value ? ['-H "Authorization: Bearer $GRU_API_KEY"'] : []),
    `-d ${quoted(JSON.stringify(copiedFields(), null, 2))}`,
  ].join(" \\\n  ") + "\n";
}

/** A Python program. Strings, lists and numbers of JSON are Python's, too. */
function asPython() {
  const { top_k, min_p, repetition_penalty, ...fields } = copiedFields(); // the client does not know the former
  const extra = JSON.stringify({ top_k, min_p, repetition_penalty });
  const key = elements.key.value ? 'os.environ["GRU_API_KEY"]' : '"none"';
  return [
    ...(elements.key.value ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", location).href)}, api_key=${key})`,
    "completion = client.completions.create(",
    ...Object.entries(fields).filter(([, value]) => value !== undefined)
      .map(([name, value]) => `    ${name}=${JSON.stringify(value)},`),
    ...(extra === "{}" ? [] : [`    extra_body=${extra},`]),
    ")",
    "print(completion.choices[0].text)",
    "",
  ].join("\n");
}

/** The prompt with its text, or with each of the texts that are compared. */
function asText() {
  const texts = panes.filter((pane) => !pane.root.hidden).map((pane) => elements.prompt.value + pane.text);
  return texts.length > 1 ? texts.map((text, i) => `${panes[i].title.textContent}\n\n${text}\n`).join("\n") : texts[0];
}

for (const [id, content] of [["copy", asText], ["curl", asCurl], ["python", asPython]]) {
  elements[id].addEventListener("click", () => copy(content(), elements[id]));
}
