/** The page: a conversation with the models of this server, and the time that each token took. */

import { Api, ApiError } from "./api.js";
import { Settings, keptKey } from "./settings.js";
import { Timing } from "./timing.js";
import { Turn, made } from "./turn.js";

const NEAR_END_PX = 80;
const COPIED_MS = 2000;

const byId = (id) => document.getElementById(id);
const api = new Api();
const settings = new Settings();
let history = []; // messages of a chat
let answering = null; // the AbortController of the answer under way

async function load() {
  try {
    settings.showModels(await api.models());
    await showMode();
    byId("key-form").hidden = true;
  } catch (error) {
    refused(error);
    settings.showModelsFailure(error);
  }
}

/** Whether the chosen model can chat. */
async function showMode() {
  settings.showChat(await api.hasChatTemplate(settings.model));
}

/** Ask for a key where the server wants one. */
function refused(error) {
  if (error.status !== 401) return;
  byId("key-reason").textContent = error.message;
  byId("key-form").hidden = false;
  byId("key").focus();
}

/** The path and the body that ask for the answer to a question. */
function asking(question) {
  if (!settings.isChat) return ["v1/completions", { ...settings.parameters, prompt: question }];
  const system = settings.systemPrompt;
  const messages = [...history, { role: "user", content: question }];
  if (system) messages.unshift({ role: "system", content: system });
  return ["v1/chat/completions", { ...settings.parameters, messages }];
}

async function ask(question) {
  const [path, body] = asking(question);
  const isChat = settings.isChat;
  const turn = new Turn(question);
  const timing = new Timing(performance.now());
  answering = new AbortController();
  begin(turn);
  let reason = "";
  try {
    reason = await receive(api.stream(path, body, answering.signal), turn, timing);
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else fail(turn, question, error);
  }
  finish(turn, timing, reason);
  if (isChat && turn.text && turn.node.isConnected) remember(question, turn.text);
}

/** Show a stream as it comes; return why it ended. */
async function receive(stream, turn, timing) {
  let reason = "";
  for await (const chunk of stream) {
    const nowMs = performance.now();
    const choice = chunk.choices[0];
    if (choice) {
      const piece = choice.text ?? choice.delta?.content ?? "";
      const isOpening = choice.delta?.role && !piece;
      const isToken = piece || (choice.finish_reason === null && !isOpening);
      if (isToken) turn.add(piece, timing.token(nowMs));
      else if (choice.finish_reason !== null) timing.last(nowMs);
      reason = choice.finish_reason ?? reason;
    }
    if (chunk.usage) timing.counted(chunk.usage.completion_tokens);
    keepEndInView(() => turn.show(timing));
  }
  return reason;
}

function begin(turn) {
  byId("welcome").hidden = true;
  byId("turns").append(turn.node);
  turn.node.scrollIntoView({ block: "end" });
  showBusy(true);
  announce("The model is answering.");
}

function finish(turn, timing, reason) {
  keepEndInView(() => turn.end(timing, reason, copyButton(turn)));
  answering = null;
  showBusy(false);
  if (!turn.text || !turn.node.isConnected) return; // cleared meanwhile
  announce(`${reason === "stopped" ? "Stopped" : "The model answered"}: ${turn.text}`);
}

/** A question that was refused goes back where it was written, to be changed. */
function fail(turn, question, error) {
  const known = error instanceof ApiError ? error : new ApiError(String(error));
  turn.fail(known);
  if (!turn.text && !byId("question").value) setQuestion(question);
  refused(known);
}

function remember(question, answer) {
  history.push({ role: "user", content: question }, { role: "assistant", content: answer });
}

function showBusy(isBusy) {
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
}

/** Change the conversation; where its end was in view, it stays in view. */
function keepEndInView(change) {
  const view = byId("conversation");
  const isAtEnd = view.scrollHeight - view.scrollTop - view.clientHeight < NEAR_END_PX;
  change();
  if (isAtEnd) view.scrollTop = view.scrollHeight;
}

/** Tell a screen reader: whole sentences, never token by token. */
function announce(text) {
  byId("announcer").textContent = text;
}

function copyButton(turn) {
  const button = made("button", "quiet", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    const isCopied = await copy(turn.text);
    button.textContent = isCopied ? "Copied" : "Not copied: the browser forbids it";
    announce(button.textContent);
    setTimeout(() => (button.textContent = "Copy"), COPIED_MS);
  });
  return button;
}

/** The clipboard API exists on secure origins alone: not on http:// beyond this machine. */
async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const from = made("textarea", "unseen");
  from.value = text;
  document.body.append(from);
  const focused = document.activeElement;
  from.select();
  const isCopied = document.execCommand("copy");
  from.remove();
  focused?.focus();
  return isCopied;
}

function setQuestion(text) {
  byId("question").value = text;
  fitQuestion();
}

/** As tall as its text, within what the style sheet allows. */
function fitQuestion() {
  const field = byId("question");
  field.rows = Math.min(8, field.value.split("\n").length);
}

function submit() {
  const question = byId("question").value;
  if (answering || !question.trim() || !settings.check()) return;
  setQuestion("");
  byId("question").focus();
  ask(question);
}

function stop() {
  if (!answering) return;
  answering.abort();
  byId("question").focus();
}

function clear() {
  answering?.abort();
  history = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  announce("New conversation.");
  byId("question").focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("question").addEventListener("input", fitQuestion);
byId("question").addEventListener("keydown", (event) => {
  const isPlain = !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey;
  if (event.key !== "Enter" || !isPlain || event.isComposing) return; // Enter ends a composition
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
byId("settings").addEventListener("change", (event) => {
  if (event.target.name === "model") showMode();
});
byId("stop").addEventListener("click", stop);
byId("clear").addEventListener("click", clear);
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  api.key = byId("key").value.trim();
  keptKey.write(api.key);
  await load();
  if (byId("key-form").hidden) byId("question").focus();
});

api.key = keptKey.read();
byId("question").focus();
load();
