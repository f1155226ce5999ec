"use strict"; // A text as it is generated, token by token, with its figures.

const FINISH_REASONS = { stop: "the document ended or a stop string was generated", length: "max tokens reached" };
const pieceOf = new WeakMap(); // each span's piece

const titleOf = ({ id, version, bits_per_byte: score }) =>
  `${id}, version ${version}${score == null ? "" : `, ${score.toFixed(3)} bits per byte`}`;

/** Whether a chunk's token lists have one length and offsets in ascending order from `least` on. */
function isConsistent(logprobs, least) {
  const { tokens, token_logprobs: values, text_offset: offsets } = logprobs ?? {};
  return [tokens, values, offsets].every(Array.isArray) && tokens.length === values.length
    && tokens.length === offsets.length && offsets.every((offset, i) => Number.isInteger(offset)
    && offset >= (i ? offsets[i - 1] : least ?? offset));
}

/** The log-probability of a piece's tokens together; null if unknown. */
function totalLogprob({ tokens }) {
  const isKnown = tokens.length && tokens.every((token) => token.logprob !== null);
  return isKnown ? tokens.reduce((sum, token) => sum + token.logprob, 0) : null;
}

/** One text with its figures. */
class Pane {
  constructor(root, suffix = "") {
    this.root = root;
    const part = (name) => root.querySelector(`#${name}${suffix}`);
    [this.box, this.title] = [part("text"), part("title")];
    this.figures = Object.fromEntries(["tokens", "rate", "first", "finish", "used"].map((name) => [name, part(name)]));
    this.controller = null; // of the request in progress
    this.clear();
  }

  /** Remove the text. The next one is of this model, or of the one that the server chooses. */
  clear(model = null) {
    this.version = model && `${model.id.split("@")[0]}:${model.version}`;
    this.title.textContent = model ? titleOf(model) : "";
    this.codePoints = []; // the text; text_offset counts code points
    this.pieces = []; // {offset, tokens, span}: each covers the text up to the next one's offset, in ascending order
    this.drawn = 0; // number of pieces that have a span
    this.base = null; // text_offset at the beginning of the text, since a server may count the prompt
    this.box.replaceChildren();
    elements.tip.hidden = true;
    for (const figure of Object.values(this.figures)) figure.textContent = "–";
  }

  get text() {
    return this.codePoints.join("");
  }

  /** Generate the text. Show errors; return how it ended, in words. */
  async generate(body) {
    const controller = this.controller = new AbortController();
    this.showProgress(true);
    let finish = "error";
    try {
      finish = await this.stream(this.version ? { ...body, model: this.version } : body, controller.signal);
      return `Finished: ${FINISH_REASONS[finish] ?? finish}.`;
    } catch (error) {
      if (!controller.signal.aborted) showError(error, this.version);
      else finish = "stopped";
      return finish === "stopped" ? "Stopped." : "";
    } finally {
      this.figures.finish.textContent = finish;
      controller.abort(); // closes a response that was not read to its end
      this.showProgress(false);
    }
  }

  showProgress(running) {
    this.box.classList.toggle("running", running);
    this.box.setAttribute("aria-busy", running);
  }

  /** Send the request and show the text as it comes. Return the finish reason. */
  async stream(body, signal) {
    const { figures } = this, start = performance.now();
    let finish = null, tokens = null, first = null, last = null;
    figures.used.textContent = body.seed;
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw await errorFrom(response);
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw serverError(chunk.error.message);
        if (!body.model && chunk.system_fingerprint !== lastFingerprint) {
          showModel(lastFingerprint = chunk.system_fingerprint);
        }
        for (const choice of chunk.choices) {
          if (choice.text) first ??= performance.now();
          last = performance.now();
          if (choice.logprobs?.tokens) tokens += choice.logprobs.tokens.length;
          finish = choice.finish_reason ?? finish;
          this.show(choice);
        }
        tokens = chunk.usage?.completion_tokens ?? tokens;
        figures.tokens.textContent = tokens ?? "–";
        if (first !== null) figures.first.textContent = `${((first - start) / 1000).toFixed(2)} s`;
        if (tokens > 1 && last > first) figures.rate.textContent = ((tokens - 1) / (last - first) * 1000).toFixed(1);
      }
      if (!finish) throw new Error("it ended before the text did");
    } catch (error) {
      if (error.fromServer || signal.aborted) throw error;
      throw serverError(`The stream broke off: ${error.message}. The text so far is kept.`);
    }
    return finish;
  }

  /** Add a chunk. `text` is the text; the tokens, which may be ahead of it, only determine where spans begin. */
  show({ text, logprobs }) {
    const { box, codePoints, pieces } = this, begin = codePoints.length;
    const atEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 40;
    for (const codePoint of text) codePoints.push(codePoint);
    const least = this.base === null ? null : this.base + (pieces.at(-1)?.offset ?? 0);
    if (isConsistent(logprobs, least) && (pieces.length || logprobs.tokens.length)) {
      logprobs.tokens.forEach((name, i) => {
        this.base ??= logprobs.text_offset[i] - begin;
        const offset = logprobs.text_offset[i] - this.base;
        const token = { name, logprob: logprobs.token_logprobs[i], top: logprobs.top_logprobs?.[i] ?? {} };
        if (pieces.at(-1)?.offset === offset) pieces.at(-1).tokens.push(token); // several tokens of one character
        else pieces.push({ offset, tokens: [token] });
      });
    } else if (text && (logprobs || this.base === null)) { // otherwise it is held-back text of tokens that came earlier
      while (pieces.at(-1)?.offset >= begin) pieces.pop();
      pieces.push({ offset: begin, tokens: [] });
    }
    for (let i = Math.max(0, this.drawn - 1); i < pieces.length && pieces[i].offset < codePoints.length; i++) {
      this.draw(i);
    }
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  draw(i) {
    const piece = this.pieces[i];
    if (!piece.span) {
      piece.span = make("span");
      piece.span.tabIndex = i ? -1 : 0;
      pieceOf.set(piece.span, piece);
      this.box.append(piece.span);
      this.drawn = i + 1;
    }
    piece.span.textContent = this.codePoints.slice(piece.offset, this.pieces[i + 1]?.offset).join("");
    const bits = -totalLogprob(piece) / Math.LN2; // information content, on which 1 % and 10 % differ visibly
    piece.span.style.setProperty("--surprise", Math.min(1, bits / 10));
  }
}

/** A copy of the pane whose ids end with the suffix. */
function copyOf(pane, suffix) {
  const copy = pane.cloneNode(true);
  for (const element of [copy, ...copy.querySelectorAll("[id]")]) element.id += suffix;
  copy.hidden = true;
  pane.after(copy);
  return copy;
}

const panes = [new Pane(elements.pane), new Pane(copyOf(elements.pane, "-2"), "-2")];
