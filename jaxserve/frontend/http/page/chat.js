// The chat: a conversation, the message being written, and the answer being streamed.

import { requestFields, startParameters, systemText } from "./parameters.js";
import { events } from "./sse.js";
import { hide, startTokens, TokenText } from "./tokens.js";

const KEY = "jaxserve-conversation";
const log = document.getElementById("log");
const empty = document.getElementById("empty");
const form = document.getElementById("composer");
const prompt = document.getElementById("prompt");
const send = document.getElementById("send");
const clear = document.getElementById("clear");

let conversation = []; // What the model is told: messages with a role and content.
let running = null; // The AbortController of the answer that is coming, if one is.

export function startChat() {
  startParameters();
  startTokens(log);
  restore();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else ask(prompt.value.trim());
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) form.requestSubmit();
    }
  });
  clear.addEventListener("click", () => {
    running?.abort();
    conversation = [];
    keep();
    hide();
    log.replaceChildren(empty);
    prompt.focus();
  });
}

async function ask(text) {
  if (!text) return;
  prompt.value = "";
  const controller = new AbortController();
  setRunning(controller);
  const question = addMessage("user", text);
  conversation.push({ role: "user", content: text });
  const talk = conversation;
  const answer = new Answer();
  try {
    await answer.stream(talk, controller.signal);
  } catch (error) {
    if (!controller.signal.aborted) {
      showProblem(error.message);
      answer.note("failed");
    } else {
      answer.note("stopped");
    }
  }
  answer.finish();
  if (answer.content) {
    talk.push({ role: "assistant", content: answer.content });
  } else if (talk === conversation) {
    // Nothing was answered: the next request does without it, and it can be sent again.
    talk.pop();
    question.classList.add("unsent");
    prompt.value ||= text;
  }
  keep();
  if (running === controller) setRunning(null);
}

function setRunning(controller) {
  running = controller;
  send.textContent = controller ? "Stop" : "Send";
  log.setAttribute("aria-busy", String(Boolean(controller)));
}

class Answer {
  constructor() {
    this.content = "";
    this.tokens = 0;
    this.first = 0;
    this.box = addMessage("assistant", "");
    this.text = this.box.querySelector(".text");
    this.notes = [];
    this.scored = null;
  }

  async stream(talk, signal) {
    const system = systemText();
    const messages = system ? [{ role: "system", content: system }, ...talk] : talk;
    const body = {
      ...requestFields(), messages, stream: true, stream_options: { include_usage: true },
    };
    const began = performance.now();
    let response;
    try {
      response = await fetch("v1/chat/completions", {
        method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body), signal,
      });
    } catch (error) {
      throw signal.aborted ? error : new Error("The server cannot be reached.");
    }
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(describe(event.error));
      this.take(event, began);
    }
  }

  take(event, began) {
    const now = performance.now();
    const [choice] = event.choices;
    if (choice) {
      const { delta } = choice;
      const scored = choice.logprobs?.content;
      if (delta.reasoning_content && !scored && !this.scored) this.think(delta.reasoning_content);
      if (scored) this.score(scored);
      else if (delta.content && !this.scored) this.text.append(delta.content);
      if (delta.content || scored) this.first ||= now;
      this.content += delta.content ?? "";
      if (choice.finish_reason) this.note(choice.finish_reason);
      stickToEnd();
    }
    if (event.usage) {
      const { prompt_tokens, completion_tokens, prompt_tokens_details } = event.usage;
      const cached = prompt_tokens_details?.cached_tokens;
      const rate = (completion_tokens - 1) / ((now - this.first) / 1000);
      this.note(`${prompt_tokens} tokens in${cached ? ` (${cached} cached)` : ""}`);
      this.note(`${completion_tokens} out`);
      if (this.first) this.note(`first after ${Math.round(this.first - began)} ms`);
      if (completion_tokens > 1 && Number.isFinite(rate)) this.note(`${rate.toFixed(1)} tokens/s`);
    }
  }

  score(entries) {
    this.scored ??= new TokenText(this.text);
    for (const entry of entries) this.scored.add(entry);
  }

  think(text) {
    if (!this.reasoning) {
      this.reasoning = document.createElement("div");
      this.reasoning.className = "reasoning text";
      this.text.before(this.reasoning);
    }
    this.reasoning.append(text);
  }

  note(text) {
    this.notes.push(text);
    this.box.querySelector(".note").textContent = this.notes.join(" · ");
  }

  finish() {
    this.scored?.finish(this.content);
    stickToEnd();
  }
}

async function problemOf(response) {
  try {
    return describe((await response.json()).error, response.status);
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

function describe(error, status) {
  return [status, error.message].filter(Boolean).join(": ");
}

let sticky = true;
log.addEventListener("scroll", () => {
  sticky = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
});

function stickToEnd() {
  if (sticky) log.scrollTop = log.scrollHeight;
}

function addMessage(role, text) {
  empty.remove();
  const box = document.createElement("article");
  box.className = `message ${role}`;
  for (const [name, content] of [["who", role === "user" ? "You" : "Model"], ["text", text],
    ["note", ""]]) {
    const part = document.createElement("div");
    part.className = name;
    part.textContent = content;
    if (name !== "note" || role !== "user") box.append(part);
  }
  log.append(box);
  sticky = true;
  stickToEnd();
  return box;
}

function showProblem(text) {
  const box = document.createElement("p");
  box.className = "problem";
  box.setAttribute("role", "alert");
  box.textContent = text;
  log.append(box);
  stickToEnd();
}

// The conversation survives a reload, and ends with the tab.
function keep() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(conversation));
  } catch {} // A browser that keeps nothing still works.
}

function restore() {
  try {
    conversation = JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
  } catch {
    conversation = [];
  }
  for (const { role, content } of conversation) addMessage(role, content);
}
