/** The panel of settings: models, mode, parameters, key. */

import { GAP_LIMITS_MS } from "./timing.js";
import { made } from "./turn.js";

const KEY = "api-key";
const COMPLETION_TOKENS = 128; // the API's own default of 16 is too short to look at
const NARROW = "(max-width: 52rem)";

const byId = (id) => document.getElementById(id);

export class Settings {
  #form = byId("settings");

  constructor() {
    this.#showScale();
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("change", () => this.#changed());
    byId("panel-toggle").addEventListener("click", () => this.#showPanel(byId("panel").hidden));
    this.#showPanel(!matchMedia(NARROW).matches);
    this.#changed();
  }

  get model() {
    return this.#form.elements.model?.value || undefined;
  }

  get isChat() {
    return this.#form.elements.mode.value === "chat";
  }

  get systemPrompt() {
    return byId("system").value.trim();
  }

  /** Fields of a request; what is not given, the server decides. */
  get parameters() {
    const parameters = { model: this.model };
    const temperature = byId("temperature").valueAsNumber;
    const maxTokens = byId("max-tokens").valueAsNumber;
    if (!Number.isNaN(temperature)) parameters.temperature = temperature;
    if (!Number.isNaN(maxTokens)) parameters.max_tokens = maxTokens;
    else if (!this.isChat) parameters.max_tokens = COMPLETION_TOKENS;
    return parameters;
  }

  /** Whether all parameters are in range; the browser says which is not. */
  check() {
    if (this.#form.checkValidity()) return true;
    this.#showPanel(true);
    return this.#form.reportValidity();
  }

  showModels(models) {
    const choices = models.map(({ id, max_model_len: length }, index) => {
      const choice = made("label", "choice");
      const radio = made("input");
      Object.assign(radio, { type: "radio", name: "model", value: id, checked: index === 0 });
      const facts = length ? made("span", "hint", `${length.toLocaleString("en")} tokens`) : "";
      choice.append(radio, made("span", "name", id), facts);
      return choice;
    });
    byId("models").replaceChildren(...choices);
    byId("models-failure").hidden = true;
  }

  showModelsFailure(error) {
    byId("models-failure").textContent = error.message;
    byId("models-failure").hidden = false;
  }

  /** A model without a chat template can only continue a text. */
  showChat(isPossible) {
    const [chat, completion] = this.#form.elements.mode;
    chat.disabled = !isPossible;
    if (!isPossible) completion.checked = true;
    byId("mode-hint").hidden = isPossible;
    byId("mode-hint").textContent = "This model has no chat template: it continues a text.";
    this.#changed();
  }

  #changed() {
    byId("system").disabled = !this.isChat;
    byId("question").placeholder = this.isChat ? "Message" : "Text to continue";
    byId("max-tokens").placeholder = this.isChat ? "the server's default" : COMPLETION_TOKENS;
    byId("turns").classList.toggle("tinted", byId("timing").checked);
  }

  #showPanel(isShown) {
    byId("panel").hidden = !isShown;
    byId("panel-toggle").setAttribute("aria-expanded", isShown);
  }

  #showScale() {
    const limits = GAP_LIMITS_MS.map((limit) => `to ${limit} ms`);
    const labels = [...limits, `above ${GAP_LIMITS_MS.at(-1)} ms`];
    byId("scale").append(
      ...labels.map((label, level) => made("li", `piece gap-${level}`, label)),
    );
  }
}

/** The key of this tab: gone when the tab is closed. */
export const keptKey = {
  read() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return ""; // storage is closed to this page: the key lasts until the page is left
    }
  },
  write(key) {
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // As above.
    }
  },
};
