// Calls to the server with the API key, and parsing of server-sent events.

const KEY = "muxjax-key";
let pendingDialog = null; // one dialog at a time

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

/** Asks for a key, with one dialog for all waiting calls. Resolves to whether a key was given. */
export function askKey(why) {
  pendingDialog ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask-key");
    const input = document.getElementById("key-text");
    document.getElementById("ask-why").textContent = why;
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use" && input.value.trim() !== "";
      if (given) sessionStorage.setItem(KEY, input.value.trim());
      pendingDialog = null;
      resolve(given);
    }, { once: true });
    dialog.showModal();
  });
  return pendingDialog;
}

/** `fetch` with the API key; asks for a key if the server requires one. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    document.getElementById("key").hidden = false;
    const why = key ? "The server rejected this key. Enter another one." : "The key is kept in this tab only.";
    forgetKey();
    if (!(await askKey(why))) throw Object.assign(new Error("an API key is required"), { name: "NoKey" });
  }
}

/** Yields the parsed data of each server-sent event of a response, up to `[DONE]`. */
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
