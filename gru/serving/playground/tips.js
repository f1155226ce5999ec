"use strict"; // A token's probability, under a moving pointer or the focus, and the keys that move the focus.

const SYMBOLS = { " ": "␣", "\n": "↵", "\t": "⇥" };
const visible = (text) => [...text].map((c) => SYMBOLS[c] ?? (c < " " ? JSON.stringify(c).slice(1, -1) : c)).join("");
const percent = (logprob) => {
  const value = Math.exp(logprob) * 100;
  return logprob === null ? "unknown" : value > 0 && value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
};

function showTip(span) {
  shown = span;
  const piece = pieceOf.get(span);
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

/** Place the tip above the span if there is room in the box, else below it, so that it covers no buttons; hide it if the
 * span is scrolled out of sight. */
function placeTip(span) {
  const { left, top, bottom } = firstRect(span), { clientWidth, clientHeight } = document.documentElement;
  const box = span.parentElement.getBoundingClientRect();
  elements.tip.hidden = bottom <= box.top || top >= box.bottom;
  elements.tip.style.left = 0; // where it can have its full width
  elements.tip.style.maxHeight = `${Math.max(top, clientHeight - bottom)}px`;
  const { offsetWidth: width, offsetHeight: height } = elements.tip;
  elements.tip.style.left = `${Math.max(8, Math.min(left, clientWidth - width - 8))}px`;
  const isAbove = top - box.top >= height || (bottom + height > clientHeight && top >= height);
  elements.tip.style.top = `${isAbove ? top - height : bottom}px`;
}

const firstRect = (span) => span.getClientRects()[0] ?? span.getBoundingClientRect();

let hideTimer = 0, shown = null;
let pointer = ""; // where the pointer was last: text that moves under a resting pointer shows no tip
const keepTip = () => clearTimeout(hideTimer);
const hideTipSoon = () => { // not at once: the pointer may be on its way to the tip
  keepTip();
  const focused = () => (elements.texts.contains(document.activeElement) ? document.activeElement : null);
  hideTimer = setTimeout(() => showTip(focused()), 150);
};
document.addEventListener("pointermove", ({ clientX, clientY, target }) => {
  if (pointer === (pointer = `${clientX} ${clientY}`)) return;
  if (pieceOf.has(target)) {
    keepTip();
    if (target !== shown || elements.tip.hidden) showTip(target);
  } else if (target.classList.contains("text")) hideTipSoon();
});
addEventListener("scroll", () => elements.tip.hidden || placeTip(shown), true);
elements.texts.addEventListener("pointerleave", hideTipSoon);
elements.tip.addEventListener("pointerenter", keepTip);
elements.tip.addEventListener("pointerleave", hideTipSoon);
elements.texts.addEventListener("focusin", ({ target }) => {
  if (!pieceOf.has(target)) return;
  target.parentElement.querySelectorAll("[tabindex='0']").forEach((span) => { span.tabIndex = -1; });
  target.tabIndex = 0;
  target.setAttribute("aria-describedby", "tip");
  showTip(target);
});
elements.texts.addEventListener("focusout", ({ target }) => {
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

elements.texts.addEventListener("keydown", (event) => {
  const span = event.target, box = span.parentElement;
  const [before, after] = ["previousElementSibling", "nextElementSibling"];
  const [left, right] = getComputedStyle(box).direction === "ltr" ? [before, after] : [after, before];
  const moves = {
    ArrowLeft: () => span[left], ArrowUp: () => onAdjacentLine(span, before),
    ArrowRight: () => span[right], ArrowDown: () => onAdjacentLine(span, after),
    Home: () => box.firstElementChild, End: () => box.lastElementChild,
  };
  if (!pieceOf.has(span) || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  moves[event.key]()?.focus();
});
