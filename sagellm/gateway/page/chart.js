/** A bar chart of the gaps of one answer. */

import { formatMs, gapLevel, percentile } from "./timing.js";

const SVG = "http://www.w3.org/2000/svg";
const MAX_BARS = 160; // of a longer answer, each bar is the longest of several gaps
const MIN_BARS = 120; // a short answer does not fill the width
const HEIGHT = 28;

export function gapChart(gapsMs) {
  const bars = barsOf(gapsMs);
  const width = Math.max(bars.length, MIN_BARS);
  const chart = element("svg", {
    class: "chart",
    viewBox: `0 0 ${width} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": described(gapsMs),
  });
  const longestMs = Math.max(...bars);
  bars.forEach((gapMs, index) => chart.append(bar(gapMs, index, longestMs)));
  return chart;
}

function described(gapsMs) {
  const sorted = gapsMs.toSorted((a, b) => a - b);
  const shares = [["median", 0.5], ["p95", 0.95]];
  const said = shares.map(([name, share]) => `${name} ${formatMs(percentile(sorted, share))}`);
  return `Gaps between pieces: ${said.join(", ")}, longest ${formatMs(sorted.at(-1))}`;
}

function barsOf(gapsMs) {
  const perBar = Math.ceil(gapsMs.length / MAX_BARS);
  const bars = [];
  for (let start = 0; start < gapsMs.length; start += perBar) {
    bars.push(Math.max(...gapsMs.slice(start, start + perBar)));
  }
  return bars;
}

function bar(gapMs, index, longestMs) {
  const height = Math.max(1, (gapMs / longestMs || 0) * HEIGHT);
  return element("rect", {
    class: `gap-${gapLevel(gapMs)}`,
    x: index + 0.1,
    y: HEIGHT - height,
    width: 0.8,
    height,
  });
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
