// The live page: shows /stats/stream. It uses no library and loads nothing from other servers.

import { Chart, color, drawBar } from "/page/charts.js";
import { askKey, call, events, forgetKey } from "/page/client.js";
import { offerModels, setUp } from "/page/playground.js";

const SECONDS = 120;
const $ = (id) => document.getElementById(id);
const percent = (part) => `${(100 * part).toFixed(part < 0.0995 && part > 0 ? 1 : 0)} %`;
const short = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
const seconds = (value) => (value < 1 ? `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`);

const charts = {
  pool: new Chart($("pool-chart"), { stacked: true, top: 1, format: percent }),
  time: new Chart($("time-chart"), { stacked: true, top: 1, format: percent }),
  rate: new Chart($("rate-chart"), { stacked: false, top: null, format: short }),
  queue: new Chart($("queue-chart"), { stacked: false, top: null, format: short }),
};
const history = []; // last two minutes: { at, pool, time, rate, queue }, each by model name
let before = null;
let paused = false;

function measure(now) {
  const gap = before ? now.time - before.time : 0;
  const at = { at: now.time, pool: {}, time: {}, rate: {}, queue: {} };
  for (const model of now.models) {
    const past = before?.models.find((other) => other.name === model.name);
    // The counters of a restarted unit begin at zero.
    const grown = (...keys) => {
      const sum = (from) => keys.reduce((total, key) => total + (from?.[key] ?? 0), 0);
      return gap > 0 && past ? Math.max(0, sum(model) - sum(past)) / gap : 0;
    };
    at.pool[model.name] = now.pool.pages ? (model.kv_pages_used ?? 0) / now.pool.pages : 0;
    at.time[model.name] = grown("prefill_seconds", "decode_seconds");
    at.rate[model.name] = grown("output_tokens");
    at.queue[model.name] = model.queue;
  }
  const busy = Object.values(at.time).reduce((sum, part) => sum + part, 0);
  if (busy > 1) for (const name in at.time) at.time[name] /= busy; // a step counts when it ends, so more than 1 is possible
  return at;
}

function take(now) {
  const at = measure(now);
  before = now;
  history.push(at);
  while (history.length && now.time - history[0].at > SECONDS) history.shift();
  showState(now);
  offerModels(now.models);
  if (!paused) show(now);
}

function showState(now) {
  const broken = now.units.some((unit) => !unit.works);
  const [state, words] = now.stopping ? ["stopping", "stopping"]
    : broken ? ["failed", "a unit is down"]
    : now.stale ? ["stale", "engine not responding"]
    : ["live", "live"];
  setStatus(state, words);
}

function setStatus(state, words) {
  const element = $("status");
  if (element.dataset.state !== state) element.dataset.state = state;
  const shown = element.querySelector(".words");
  if (shown.textContent !== words) shown.textContent = words;
}

function show(now) {
  const last = smooth();
  const names = now.models.map((model) => model.name);
  const total = (kind) => names.reduce((sum, name) => sum + (last[kind][name] ?? 0), 0);
  $("policy").textContent = now.policy ?? "–";
  $("pool-size").textContent = bytes(now.pool.bytes);
  $("total-rate").textContent = short(total("rate"));
  $("pool-now").textContent = percent(total("pool"));
  $("time-now").textContent = `${percent(total("time"))} busy`;
  $("rate-now").textContent = `${short(total("rate"))} tokens/s`;
  $("queue-now").textContent = `${total("queue")} waiting`;
  for (const kind of ["pool", "time"]) {
    drawBar($(`${kind}-bar`), names.map((name, index) => {
      const part = last[kind][name] ?? 0;
      return { index, part, title: `${name} ${percent(part)}` };
    }));
  }
  const ages = history.map((at) => now.time - at.at);
  for (const [kind, chart] of Object.entries(charts)) {
    chart.draw(names.map((name) => history.map((at) => at[kind][name] ?? 0)), ages, SECONDS);
  }
  showTable(now, last);
}

/** The newest values; rates are means over three seconds, because steps come in bursts. */
function smooth() {
  const newest = history.at(-1);
  const recent = history.filter((at) => newest.at - at.at < 3);
  const mean = (kind) => Object.fromEntries(Object.keys(newest[kind]).map((name) =>
    [name, recent.reduce((sum, at) => sum + (at[kind][name] ?? 0), 0) / recent.length]));
  return { ...newest, rate: mean("rate"), time: mean("time") };
}

function showTable(now, last) {
  const body = $("models").tBodies[0];
  const rows = new Map([...body.rows].map((row) => [row.dataset.model, row]));
  now.models.forEach((model, index) => {
    const row = rows.get(model.name) ?? newRow(body, model.name, index);
    rows.delete(model.name);
    const cells = row.cells;
    set(cells[1], model.status);
    cells[1].className = `state ${model.status}`;
    cells[1].title = model.error ?? "";
    set(cells[2], model.unit ?? "–");
    set(cells[3], String(model.running ?? 0));
    set(cells[4], String(Math.max(model.queue, model.waiting ?? 0)));
    set(cells[5], short(last.rate[model.name] ?? 0));
    latency(cells[6], model.latency.ttft, model.slo.ttft);
    latency(cells[7], model.latency.tpot, model.slo.tpot);
    pages(cells[8], model, index);
  });
  for (const row of rows.values()) row.remove();
}

function newRow(body, name, index) {
  const row = body.insertRow();
  row.dataset.model = name;
  const first = row.appendChild(document.createElement("th"));
  first.scope = "row";
  first.className = "name";
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.background = color(index);
  first.append(swatch, name);
  for (let cell = 1; cell < 9; cell += 1) row.insertCell();
  for (const cell of [3, 4, 5]) row.cells[cell].className = "n";
  const box = document.createElement("div");
  box.className = "pages";
  const meter = document.createElement("span");
  meter.className = "meter";
  meter.append(document.createElement("i"));
  box.append(document.createElement("span"), meter);
  row.cells[8].append(box);
  return row;
}

function latency(cell, found, target) {
  const words = found ? `${seconds(found.p50)} · ${seconds(found.p95)}` : "–";
  if (!target) return set(cell, words);
  const asked = target.hits + target.misses;
  const met = asked ? `, ${percent(target.hits / asked)} met` : "";
  const over = asked && target.hits / asked < 0.9 ? " over" : "";
  const note = `target ${seconds(target.seconds)}${met}`;
  if (cell.dataset.shown === words + note) return;
  cell.dataset.shown = words + note;
  const small = document.createElement("span");
  small.className = `slo${over}`;
  small.textContent = note;
  cell.replaceChildren(words, small);
}

function pages(cell, model, index) {
  const [words, meter] = cell.firstChild.children;
  const used = model.kv_pages_used ?? 0;
  const quota = model.kv_pages_quota ?? 0;
  const more = ["borrowed", "cached"].map((what) => [model[`kv_pages_${what}`], what]).filter(([count]) => count);
  set(words, [`${used} of ${quota}`, ...more.map((pair) => pair.join(" "))].join(", "));
  meter.firstChild.style.width = `${quota ? Math.min(100, (100 * used) / quota) : 0}%`;
  meter.firstChild.style.background = color(index);
}

function set(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

function bytes(count) {
  if (!count) return "–";
  const power = Math.min(4, Math.floor(Math.log10(count) / 3));
  return `${(count / 1000 ** power).toFixed(power > 2 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

async function follow() {
  for (;;) {
    try {
      const answer = await call("/stats/stream");
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      for await (const now of events(answer)) take(now);
      setStatus("lost", "server has shut down");
    } catch (error) {
      if (error.name === "NoKey") {
        setStatus("lost", "API key required");
        return; // the Key button retries
      }
      setStatus("lost", "no connection");
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("muxjax-theme", theme);
}

const wanted = localStorage.getItem("muxjax-theme");
document.documentElement.dataset.theme = wanted ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Resume" : "Pause";
});
$("key").addEventListener("click", () => {
  forgetKey();
  askKey("Enter the new key.").then((given) => given && location.reload());
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "t") $("theme").click();
  if (event.key === "p") $("pause").click();
});
setUp();
follow();
