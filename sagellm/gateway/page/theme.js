// The theme, set before the first paint: a module would come after it.
"use strict";

const THEMES = ["system", "light", "dark"];

function readTheme() {
  try {
    const kept = localStorage.getItem("theme");
    return THEMES.includes(kept) ? kept : "system";
  } catch {
    return "system"; // storage is closed to this page
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // The theme then lasts until the page is left.
  }
}

document.documentElement.dataset.theme = readTheme();

document.addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  const show = () => {
    button.textContent = `Theme: ${document.documentElement.dataset.theme}`;
  };
  button.addEventListener("click", () => {
    const index = THEMES.indexOf(document.documentElement.dataset.theme);
    setTheme(THEMES[(index + 1) % THEMES.length]);
    show();
  });
  show();
});
