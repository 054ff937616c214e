// Playground: sends one prompt to two models.

import { call, events } from "/page/client.js";

const $ = (id) => document.getElementById(id);
let modelsByName = new Map();
let running = null; // aborts both requests

/** Lists the models in both menus and keeps the selection. */
export function updateMenus(models) {
  modelsByName = new Map(models.map((model) => [model.name, model]));
  const names = models.filter((model) => model.text).map((model) => model.name);
  ["a", "b"].forEach((side, position) => {
    const select = $(`model-${side}`);
    const listed = [...select.options].map((option) => option.value);
    if (listed.join("\n") === names.join("\n")) return;
    const chosen = select.value || names[Math.min(position, names.length - 1)];
    select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  });
}

export function setUp() {
  $("play").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      $("play").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => running?.abort());
}

async function send() {
  running?.abort();
  const control = new AbortController();
  running = control;
  $("stop").disabled = false;
  await Promise.all([generate("a", control), generate("b", control)]);
  if (running === control) {
    running = null;
    $("stop").disabled = true;
  }
}

async function generate(side, control) {
  const model = modelsByName.get($(`model-${side}`).value);
  const out = $(`text-${side}`);
  const speed = $(`speed-${side}`);
  out.textContent = "";
  out.classList.remove("error");
  speed.textContent = "";
  if (!model) return;
  out.classList.add("busy");
  const prompt = $("prompt").value;
  const body = {
    model: model.name,
    max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(model.chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const started = performance.now();
  let first = null;
  let reason = null;
  try {
    const response = await call(model.chat ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: control.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text && first === null) first = performance.now() - started;
      if (text) out.append(text);
      reason = choice?.finish_reason ?? reason;
      if (event.usage) speed.textContent = summary(event.usage.completion_tokens, first, performance.now() - started, reason);
      out.scrollTop = out.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") {
      speed.textContent = "stopped";
    } else {
      out.classList.add("error");
      out.append(out.textContent ? `\n${error.message}` : error.message);
    }
  } finally {
    out.classList.remove("busy");
  }
}

function summary(tokens, first, total, reason) {
  if (first === null) return `${tokens} tokens`;
  const rate = tokens > 1 ? ` · ${((1000 * (tokens - 1)) / Math.max(1, total - first)).toFixed(1)} tokens/s` : "";
  return `first token after ${Math.round(first)} ms · ${tokens} tokens${rate}${reason === "abort" ? " · aborted" : ""}`;
}
