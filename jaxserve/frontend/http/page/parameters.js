// How answers are asked for: reads the form, remembers it, and says in one line what is set.

const KEY = "jaxserve-parameters";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
export const ALTERNATIVES = 5;

const form = document.getElementById("parameters-form");
const line = document.getElementById("parameters-now");

export function startParameters() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    for (const [name, value] of Object.entries(kept)) {
      const field = form.elements[name];
      if (field?.type === "checkbox") field.checked = value;
      else if (field) field.value = value;
    }
  } catch {} // Nothing is kept here, or nothing that can be read.
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  changed();
}

function changed() {
  const kept = { system: form.elements.system.value, logprobs: form.elements.logprobs.checked };
  for (const name of NUMBERS) kept[name] = form.elements[name].value;
  try {
    localStorage.setItem(KEY, JSON.stringify(kept));
  } catch {} // A browser that keeps nothing still works.
  const said = NUMBERS.filter((name) => kept[name] !== "")
    .map((name) => `${name.replace("_", " ")} ${kept[name]}`);
  line.textContent = [...said, kept.system ? "system text" : ""].filter(Boolean).join(", ");
}

export function systemText() {
  return form.elements.system.value.trim();
}

// The fields of a request. What is left empty is the server's to choose; what is wrong is the
// server's to refuse, in its own words.
export function requestFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const text = form.elements[name].value;
    if (text !== "") fields[name] = Number(text);
  }
  if (form.elements.logprobs.checked) {
    fields.logprobs = true;
    fields.top_logprobs = ALTERNATIVES;
  }
  return fields;
}
