// The tokens of an answer: one span each, tinted where the model was unsure, with what else could
// have stood there on hover, on touch, and with the arrow keys.

const tip = document.getElementById("tip");
const entries = new WeakMap();
let current = null;

// Draws tokens into an element as they come. A character may be spread over several tokens; it
// belongs to the one that ends it.
export class TokenText {
  constructor(element) {
    this.element = element;
    this.decoder = new TextDecoder();
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", "Answer; arrow keys go through its tokens");
  }

  add(entry) {
    const span = document.createElement("span");
    const text = this.decoder.decode(new Uint8Array(entry.bytes), { stream: true });
    const probability = Math.exp(entry.logprob);
    span.className = "token";
    if (probability < 0.2) span.classList.add("doubtful");
    else if (probability < 0.6) span.classList.add("unsure");
    span.textContent = text;
    entries.set(span, entry);
    this.element.append(span);
  }

  // Tokens behind the end of the text, such as the one that ends an answer, are shown as marks.
  finish(content) {
    let length = 0;
    for (const span of this.element.children) {
      if (length >= content.length && span.textContent) span.classList.add("mark");
      length += span.textContent.length;
    }
  }
}

export function startTokens(log) {
  log.addEventListener("pointerover", (event) => show(event.target.closest(".token")));
  log.addEventListener("pointerdown", (event) => show(event.target.closest(".token")));
  log.addEventListener("pointerleave", hide);
  log.addEventListener("scroll", () => current && place(current));
  addEventListener("resize", hide);
  log.addEventListener("focusout", hide);
  log.addEventListener("keydown", (event) => {
    const group = event.target.closest("[role=group]");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!group || !step) return;
    event.preventDefault();
    const spans = [...group.children];
    const place = spans.indexOf(current);
    const start = step > 0 ? 0 : spans.length - 1;
    show(place < 0 ? spans[start] : (spans[place + step] ?? current));
  });
}

export function hide() {
  current?.classList.remove("current");
  current = null;
  tip.hidden = true;
}

function show(span) {
  hide();
  const entry = entries.get(span);
  if (!entry) return;
  current = span;
  span.classList.add("current");
  span.scrollIntoView({ block: "nearest" });
  tip.replaceChildren(describe(entry));
  tip.hidden = false;
  place(span);
}

function place(span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const below = box.bottom + 6;
  const top = below + height > innerHeight - 8 ? box.top - height - 6 : below;
  tip.style.transform = `translate(${left}px, ${Math.max(8, top)}px)`;
}

function describe(entry) {
  const table = document.createElement("table");
  const others = entry.top_logprobs ?? [];
  const isChosen = (other) => String(other.bytes) === String(entry.bytes);
  const rows = others.some(isChosen) ? others : [...others, entry];
  for (const row of rows) {
    const line = table.insertRow();
    if (isChosen(row)) line.className = "chosen";
    const probability = Math.exp(row.logprob);
    line.insertCell().textContent = readable(row.token);
    line.insertCell().textContent = `${(100 * probability).toFixed(probability < 0.1 ? 2 : 1)}%`;
    line.insertCell().textContent = row.logprob.toFixed(2);
    const bar = document.createElement("i");
    bar.style.width = `${Math.max(1, 100 * probability)}%`;
    const cell = line.insertCell();
    cell.className = "bar";
    cell.append(bar);
  }
  return table;
}

// Makes white space and what cannot be seen visible.
function readable(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(nothing)";
}
