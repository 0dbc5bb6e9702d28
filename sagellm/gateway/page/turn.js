/** One turn on the page: a question, its answer as it comes, and what it took. */

import { gapChart } from "./chart.js";
import { formatMs, gapLevel } from "./timing.js";

const REASONS = { length: "ended at the most tokens", content_filter: "filtered" };

export class Turn {
  text = "";
  #answer;
  #foot;
  #isFailed = false;

  constructor(question) {
    this.node = made("li", "turn");
    this.#answer = made("div", "answer waiting");
    this.#foot = made("footer", "foot");
    this.node.append(said("You", made("div", "question", question)), said("Model", this.#answer));
    this.node.append(this.#foot);
  }

  /** Show the next piece. `gapMs` is null for the first. */
  add(piece, gapMs) {
    this.#answer.classList.remove("waiting");
    if (!piece) return; // a token whose character is not whole yet
    this.text += piece;
    const shown = made("span", `piece gap-${gapMs === null ? "first" : gapLevel(gapMs)}`, piece);
    if (gapMs !== null) shown.title = `+${formatMs(gapMs)}`;
    this.#answer.append(shown);
  }

  /** Show the figures so far. */
  show(timing) {
    const list = made("dl", "figures");
    for (const [label, value] of timing.figures) {
      const pair = made("div");
      pair.append(made("dt", "", label), made("dd", "", value));
      list.append(pair);
    }
    this.#foot.replaceChildren(list);
  }

  /** The answer has ended: show the chart, why it ended, and the button that copies it. */
  end(timing, reason, copy) {
    this.#answer.classList.remove("waiting");
    this.show(timing);
    const note = REASONS[reason] ?? (reason === "stop" ? "" : reason);
    if (note) this.#foot.append(made("span", "note", note));
    if (this.text) this.#foot.append(copy);
    if (timing.gapsMs.length) this.#foot.append(gapChart(timing.gapsMs));
    if (!this.text && !this.#isFailed) this.#answer.append(made("span", "note", "no text"));
  }

  /** Show what the server says. */
  fail(error) {
    this.#isFailed = true;
    this.#answer.classList.remove("waiting");
    const failure = made("div", "failure");
    failure.setAttribute("role", "alert");
    failure.append(made("p", "", error.message));
    if (error.facts) failure.append(made("p", "hint", error.facts));
    this.#answer.append(failure);
  }
}

function said(who, content) {
  const block = made("section", "said");
  block.append(made("h2", "", who), content);
  return block;
}

export function made(name, className = "", text = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}
