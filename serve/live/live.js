// The live page: shows the data of /stats/stream, without libraries or files from other servers.

import { Chart, color, drawBar } from "/page/charts.js";
import { call, events, forgetKey, promptForKey } from "/page/client.js";
import { setUp, updateMenus } from "/page/playground.js";

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
const history = []; // samples of the last two minutes: the time, and four values by model name
let previous = null; // stats of the previous sample
let paused = false;

/** Builds a sample; rates are computed from the change since the previous stats. */
function measure(stats) {
  const elapsed = previous ? stats.time - previous.time : 0;
  const sample = { at: stats.time, pool: {}, time: {}, rate: {}, queue: {} };
  for (const model of stats.models) {
    const past = previous?.models.find((other) => other.name === model.name);
    // The counters of a restarted unit begin at zero.
    const rate = (...keys) => {
      const sum = (counters) => keys.reduce((total, key) => total + (counters?.[key] ?? 0), 0);
      return elapsed > 0 && past ? Math.max(0, sum(model) - sum(past)) / elapsed : 0;
    };
    sample.pool[model.name] = stats.pool.pages ? (model.kv_pages_used ?? 0) / stats.pool.pages : 0;
    sample.time[model.name] = rate("prefill_seconds", "decode_seconds");
    sample.rate[model.name] = rate("output_tokens");
    sample.queue[model.name] = model.queue;
  }
  // A step counts when it ends, so the sum may exceed 1.
  const busy = Object.values(sample.time).reduce((sum, part) => sum + part, 0);
  if (busy > 1) for (const name in sample.time) sample.time[name] /= busy;
  return sample;
}

function update(stats) {
  history.push(measure(stats));
  previous = stats;
  while (history.length && stats.time - history[0].at > SECONDS) history.shift();
  showState(stats);
  updateMenus(stats.models);
  if (!paused) show(stats);
}

function showState(stats) {
  const broken = stats.units.some((unit) => !unit.works);
  const [state, words] = stats.stopping ? ["stopping", "stopping"]
    : broken ? ["failed", "a unit is down"]
    : stats.stale ? ["stale", "engine not responding"]
    : ["live", "live"];
  setStatus(state, words);
}

function setStatus(state, words) {
  const element = $("status");
  if (element.dataset.state !== state) element.dataset.state = state;
  set(element.querySelector(".words"), words);
}

function show(stats) {
  const last = smooth();
  const names = stats.models.map((model) => model.name);
  const total = (kind) => names.reduce((sum, name) => sum + (last[kind][name] ?? 0), 0);
  $("policy").textContent = stats.policy ?? "–";
  $("pool-size").textContent = bytes(stats.pool.bytes);
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
  const ages = history.map((sample) => stats.time - sample.at);
  for (const [kind, chart] of Object.entries(charts)) {
    chart.draw(names.map((name) => history.map((sample) => sample[kind][name] ?? 0)), ages, SECONDS);
  }
  showTable(stats, last);
}

/** Returns the newest sample; rates are means over three seconds, because steps come in bursts. */
function smooth() {
  const newest = history.at(-1);
  const recent = history.filter((sample) => newest.at - sample.at < 3);
  const mean = (kind) => Object.fromEntries(Object.keys(newest[kind]).map((name) =>
    [name, recent.reduce((sum, sample) => sum + (sample[kind][name] ?? 0), 0) / recent.length]));
  return { ...newest, rate: mean("rate"), time: mean("time") };
}

function showTable(stats, last) {
  const body = $("models").tBodies[0];
  const rows = new Map([...body.rows].map((row) => [row.dataset.model, row]));
  stats.models.forEach((model, index) => {
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
    showLatency(cells[6], model.latency.ttft, model.slo.ttft);
    showLatency(cells[7], model.latency.tpot, model.slo.tpot);
    showPages(cells[8], model, index);
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

function showLatency(cell, percentiles, target) {
  const words = percentiles ? `${seconds(percentiles.p50)} · ${seconds(percentiles.p95)}` : "–";
  if (!target) return set(cell, words);
  const requests = target.hits + target.misses;
  const met = requests ? `, ${percent(target.hits / requests)} met` : "";
  const over = requests && target.hits / requests < 0.9 ? " over" : "";
  const note = `target ${seconds(target.seconds)}${met}`;
  if (cell.dataset.shown === words + note) return;
  cell.dataset.shown = words + note;
  const small = document.createElement("span");
  small.className = `slo${over}`;
  small.textContent = note;
  cell.replaceChildren(words, small);
}

function showPages(cell, model, index) {
  const [words, meter] = cell.firstChild.children;
  const used = model.kv_pages_used ?? 0;
  const quota = model.kv_pages_quota ?? 0;
  const extras = ["borrowed", "cached"].map((kind) => [model[`kv_pages_${kind}`], kind]).filter(([count]) => count);
  set(words, [`${used} of ${quota}`, ...extras.map((pair) => pair.join(" "))].join(", "));
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
      const response = await call("/stats/stream");
      if (!response.ok) throw new Error(`status ${response.status}`);
      for await (const stats of events(response)) update(stats);
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

const savedTheme = localStorage.getItem("muxjax-theme");
document.documentElement.dataset.theme = savedTheme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Resume" : "Pause";
});
$("key").addEventListener("click", () => {
  forgetKey();
  promptForKey("Enter the new key.").then((entered) => entered && location.reload());
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "t") $("theme").click();
  if (event.key === "p") $("pause").click();
});
setUp();
follow();
