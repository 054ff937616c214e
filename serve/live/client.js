// Calls to the server: with the API key if there is one, and server-sent events from any answer.

const KEY = "muxjax-key";
let ask = null; // one dialog at a time

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

/** Asks for a key, once for all who wait for it; whether one was given. */
export function askKey(why) {
  ask ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask-key");
    const input = document.getElementById("key-text");
    document.getElementById("ask-why").textContent = why;
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use" && input.value.trim() !== "";
      if (given) sessionStorage.setItem(KEY, input.value.trim());
      ask = null;
      resolve(given);
    }, { once: true });
    dialog.showModal();
  });
  return ask;
}

/** `fetch` with the key; asks for one when the server wants it. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    document.getElementById("key").hidden = false;
    const why = key ? "The server does not know this key. Enter another." : "Enter yours. It stays in this tab.";
    forgetKey();
    if (!(await askKey(why))) throw Object.assign(new Error("an API key is needed"), { name: "NoKey" });
  }
}

/** The data of each server-sent event of an answer, parsed; ends at `[DONE]`. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
