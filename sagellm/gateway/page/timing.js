/** When the tokens of one answer came. All times in milliseconds. */

/** A gap belongs to the first level whose limit it does not exceed; the last level has none. */
export const GAP_LIMITS_MS = [20, 50, 100, 250];

export function gapLevel(gapMs) {
  const level = GAP_LIMITS_MS.findIndex((limit) => gapMs <= limit);
  return level < 0 ? GAP_LIMITS_MS.length : level;
}

/** The value below which a share of the sorted values lies. */
export function percentile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

export function formatMs(ms) {
  if (ms >= 10_000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 100 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

/** `gapsMs` holds the time between one event with tokens and the next. */
export class Timing {
  ttftMs = null;
  gapsMs = [];
  #lastMs = 0;
  #numCounted = null;

  constructor(startedMs) {
    this.startedMs = startedMs;
  }

  /** An event with tokens came. Return the gap before it; null for the first. */
  token(nowMs) {
    const gapMs = this.ttftMs === null ? null : nowMs - this.#lastMs;
    if (gapMs === null) this.ttftMs = nowMs - this.startedMs;
    else this.gapsMs.push(gapMs);
    this.#lastMs = nowMs;
    return gapMs;
  }

  /** The event that only ends came, with its token, which has no text. */
  last(nowMs) {
    this.ttftMs ??= nowMs - this.startedMs;
    this.#lastMs = nowMs;
  }

  /** The server says how many tokens the answer has. */
  counted(numTokens) {
    this.#numCounted = numTokens;
  }

  /** As the server counted, or else one an event. */
  get numTokens() {
    return this.#numCounted ?? (this.ttftMs === null ? 0 : this.gapsMs.length + 1);
  }

  /** The mean time of a token after the first; null where there is none. */
  get tpotMs() {
    if (this.ttftMs === null || this.numTokens < 2) return null;
    return (this.#lastMs - this.startedMs - this.ttftMs) / (this.numTokens - 1);
  }

  /** From the call to the last token. */
  get tokensPerS() {
    const elapsedMs = this.#lastMs - this.startedMs;
    return elapsedMs > 0 ? (this.numTokens * 1000) / elapsedMs : null;
  }

  /** Label and value of each figure. */
  get figures() {
    if (this.ttftMs === null) return [];
    const figures = [["tokens", String(this.numTokens)], ["TTFT", formatMs(this.ttftMs)]];
    if (this.tpotMs !== null) figures.push(["TPOT", formatMs(this.tpotMs)]);
    if (this.tokensPerS !== null) figures.push(["tokens/s", this.tokensPerS.toFixed(1)]);
    return figures;
  }
}
