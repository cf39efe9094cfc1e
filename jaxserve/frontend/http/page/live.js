// The live view: what /live tells, twice a second, in numbers and drawings.

import { drawParts, drawPool, drawSpark } from "./drawing.js";

const SPARK_PLACES = 120; // A minute of events.
const PHASES = { plan: "p1", pack: "p2", dispatch: "p3", wait: "p4", publish: "p5" };
const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const rates = [];
let newest = null;
let last = null; // Time and tokens of the event before.

export function startLive() {
  watch();
  addEventListener("resize", () => newest && show(newest));
  matchMedia("(prefers-color-scheme: dark)")
    .addEventListener("change", () => newest && show(newest));
}

function watch() {
  const source = new EventSource("live");
  source.addEventListener("message", (event) => {
    const told = JSON.parse(event.data);
    if (told.error) return say("bad", told.error.message); // Its last words; it is asked again.
    newest = told;
    note(newest);
    show(newest);
  });
  source.addEventListener("error", () => {
    last = null;
    at("engine").classList.add("stale");
    say("bad", source.readyState === EventSource.CLOSED ? "not connected" : "connecting");
    // A refusal ends an EventSource for good.
    if (source.readyState === EventSource.CLOSED) setTimeout(watch, 5000);
  });
}

function note(event) {
  const now = { seconds: performance.now() / 1000, tokens: event.tokens.output_total };
  if (last) {
    const rate = (now.tokens - last.tokens) / Math.max(0.1, now.seconds - last.seconds);
    rates.push(Math.max(0, rate));
    if (rates.length > SPARK_PLACES) rates.shift();
  }
  last = now;
}

function say(kind, text) {
  at("health").className = `health ${kind}`;
  const words = at("health").lastElementChild;
  if (words.textContent !== text) words.textContent = text;
}

function show(event) {
  at("engine").classList.remove("stale");
  if (event.health.serving) say("good", "serving");
  else say("bad", event.health.detail);
  showTiles(event);
  showPool(event.pages);
  showLatency(event.latency);
  showPhases(event.phases);
  const { steps, preemptions, compiles_after_ready: compiles, padding } = event.counts;
  at("counts").textContent = [
    `${number.format(steps)} steps`, `${(100 * padding).toFixed(1)}% padding`,
    `${number.format(preemptions)} preemptions`, `${compiles} compiles after ready`,
    `${number.format(event.tokens.prompt_total)} prompt tokens`,
    `${number.format(event.tokens.output_total)} output tokens`,
  ].join(" · ");
}

function showTiles({ tokens, rows, queue, prefix, counts }) {
  at("rate").textContent = number.format(Math.round(tokens.per_second));
  drawSpark(at("spark"), rates, SPARK_PLACES);
  at("rows").textContent = rows.running;
  at("rows-max").textContent = `of ${rows.max}`;
  at("rows-meter").value = rows.running / Math.max(1, rows.max);
  at("queue").textContent = number.format(queue.requests);
  at("queue-more").textContent = queue.requests
    ? `oldest ${duration(queue.age_seconds)}, ${number.format(queue.tokens)} tokens` : "empty";
  at("prefix").textContent = prefix.lookup_tokens ? `${(100 * prefix.rate).toFixed(0)}%` : "–";
  at("prefix-more").textContent =
    `${number.format(prefix.hit_tokens)} of ${number.format(prefix.lookup_tokens)} tokens`;
  at("finished").textContent = number.format(counts.finished);
}

function showPool(pages) {
  for (const state of ["free", "used", "shared", "cached"]) {
    const count = pages[state];
    at(`pages-${state}`).textContent = count === null ? "–" : number.format(count);
  }
  const per = pages.map?.pages_per_cell ?? 1;
  at("pool-size").textContent = `${number.format(pages.total)} pages of ${pages.page_tokens} ` +
    `tokens${per > 1 ? `, ${per} to a square` : ""}`;
  at("pool").setAttribute("aria-label", `Page pool: ${pages.used} of ${pages.total} pages used, ` +
    `${pages.cached} cached`);
  if (!pages.map) return; // The engine is busy with a long step: the last picture stays.
  drawPool(at("pool"), Uint8Array.from(atob(pages.map.cells), (char) => char.charCodeAt(0)));
}

function showLatency(latency) {
  for (const row of at("latency").tBodies[0].rows) {
    const { seconds, least } = latency[row.dataset.of];
    seconds.forEach((value, place) => {
      // What lies in the first bucket is only known to be below its bound.
      const text = value === null ? "–" : value < least ? `< ${duration(least)}` : duration(value);
      row.cells[place + 1].textContent = text;
    });
  }
  at("latency-when").textContent =
    latency.time_to_first_token.recent ? "the last minute" : "since the start";
}

function showPhases(phases) {
  const known = Object.entries(phases).filter(([, seconds]) => seconds !== null);
  drawParts(at("phases"), known.map(([name, value]) => ({ value, name: PHASES[name] })));
  const list = at("phase-list");
  if (!list.children.length) {
    for (const name of Object.keys(PHASES)) {
      const item = document.createElement("li");
      item.className = name;
      item.append(document.createElement("i"), `${name} `, document.createElement("b"));
      list.append(item);
    }
  }
  for (const item of list.children) {
    const seconds = phases[item.className];
    item.lastElementChild.textContent = seconds === null ? "–" : duration(seconds);
  }
  const whole = known.reduce((sum, [, seconds]) => sum + seconds, 0);
  at("turn").textContent = known.length ? `takes ${duration(whole)}` : "";
}

// Seconds in the unit that suits them.
function duration(seconds) {
  if (seconds < 0.001) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (seconds < 1) return `${Number((seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0))} ms`;
  return seconds < 100 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds / 60)} min`;
}
