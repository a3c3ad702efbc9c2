"use strict";

const byId = (id) => document.getElementById(id);

// The theme: the system's, until the button says otherwise.
const theme = byId("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;

function showTheme() {
  if (chosen !== null) document.documentElement.dataset.theme = chosen;
  theme.setAttribute("aria-pressed", String(chosen === null ? prefersDark.matches : chosen === "dark"));
}

theme.addEventListener("click", () => {
  chosen = theme.getAttribute("aria-pressed") === "true" ? "light" : "dark";
  showTheme();
});
prefersDark.addEventListener("change", showTheme);
showTheme();

// The viewer: a sample, a step, and a card for each model.
if (byId("data")) {
  const data = JSON.parse(byId("data").textContent);
  const slider = byId("step"), play = byId("play"), where = byId("where");
  const cards = [...document.querySelectorAll(".card")];
  let sample = 0, timer = null;

  const short = (x, digits) => String(Number(x.toPrecision(digits)));

  function place(picture, column, row, label) {
    picture.style.setProperty("--x", column);
    picture.style.setProperty("--y", row);
    picture.setAttribute("aria-label", label);
  }

  function plot(card, path, clean, label) {
    const reach = data.reach[sample], svg = card.querySelector("svg.plane"), now = path[path.length - 1];
    svg.setAttribute("viewBox", `${-reach} ${-reach} ${2 * reach} ${2 * reach}`);
    svg.setAttribute("aria-label", `${label}: x_t at ${now.join(", ")}, estimate of x_0 at ${clean.join(", ")}`);
    card.querySelector(".path").setAttribute("points", path.map(([x, y]) => `${x},${-y}`).join(" "));
    for (const [name, [x, y], radius] of [["now", now, reach / 30], ["guess", clean, reach / 20]]) {
      const circle = card.querySelector(`.${name}`);
      circle.setAttribute("cx", x);
      circle.setAttribute("cy", -y);
      circle.setAttribute("r", radius);
    }
  }

  function draw(card, model, most) {
    const last = model.times.length - 1, k = Math.min(Number(slider.value), last), acting = k < last;
    const at = `t = ${short(model.times[k], 3)}`, label = `${model.name}, ${at}`;
    if (data.kind === "pictures") {
      place(card.querySelector(".now"), k, 2 * sample, `${label}: x_t`);
      place(card.querySelector(".guess"), k, 2 * sample + 1, `${label}: ${acting ? "estimate of x_0" : "sample"}`);
    } else if (model.x_t) {
      plot(card, model.x_t[sample].slice(0, k + 1), acting ? model.x_0[sample][k] : model.x_t[sample][last], label);
    }
    const error = acting ? model.error[sample][k] : null;  // null, too, where it is not finite
    card.querySelector(".acts").textContent = `${at}, ${acting ? (model.teacher[sample][k] ? "teacher acts" : "student acts") : "done"}`;
    card.querySelector(".error output").textContent = error !== null ? short(error, 2) : acting ? "not finite" : "–";
    card.querySelector(".bar i").style.width = `${most > 0 ? (100 * error) / most : 0}%`;
  }

  function show() {
    const most = Math.max(...data.models.flatMap((model) => model.error[sample]));
    data.models.forEach((model, i) => draw(cards[i], model, most));
    where.textContent = [`${slider.value} of ${slider.max}`, data.conditions[sample]].filter(Boolean).join(", ");
    slider.setAttribute("aria-valuetext", where.textContent);
  }

  function playing(on) {
    clearInterval(timer);
    timer = on ? setInterval(advance, Math.max(150, Math.min(800, 4000 / slider.max))) : null;
    play.textContent = on ? "Pause" : "Play";
    play.setAttribute("aria-pressed", String(on));
  }

  function advance() {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) playing(false);
  }

  play.addEventListener("click", () => {
    if (timer === null && slider.value === slider.max) slider.value = 0;
    show();
    playing(timer === null);
  });
  slider.addEventListener("input", () => {
    playing(false);
    show();
  });
  for (const radio of document.querySelectorAll("[name=sample]")) {
    radio.addEventListener("change", () => {
      sample = Number(radio.value);
      show();
    });
  }
  show();
}
