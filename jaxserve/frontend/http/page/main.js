// Puts the page together: the chat, the live view, and what both share.

import { startChat } from "./chat.js";
import { startLive } from "./live.js";

function showViews() {
  for (const name of ["chat", "engine"]) {
    document.getElementById(`show-${name}`).addEventListener("click", () => {
      document.body.dataset.view = name;
      for (const other of ["chat", "engine"]) {
        const button = document.getElementById(`show-${other}`);
        button.setAttribute("aria-pressed", String(other === name));
      }
      // Canvases that were hidden have no size until now.
      window.dispatchEvent(new Event("resize"));
    });
  }
}

async function nameModel() {
  const response = await fetch("v1/models");
  const [model] = (await response.json()).data;
  document.getElementById("model").textContent = `${model.id}, ${model.max_model_len} tokens`;
  document.title = `${model.id} – jaxserve`;
}

showViews();
startChat();
startLive();
nameModel().catch(() => {}); // The health mark says that the server is away.
